"""The techniques of fine-tuning, one file each, behind `apply_technique`."""
