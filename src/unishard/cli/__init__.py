"""The command line: `unishard ...`."""
