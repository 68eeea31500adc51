"""What can be taken out: each feature is one file that only build.py imports, and that imports no other feature."""
