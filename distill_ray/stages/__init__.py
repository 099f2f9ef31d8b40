"""The stages of a run: config in, folder out. A finished folder is returned at once; what a stage needs runs first."""
