"""Features beyond the method and its proof, one file each: see README.md."""
