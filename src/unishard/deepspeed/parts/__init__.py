"""What stands behind the names of the surface table: translations of DeepSpeed's calls into the engine's."""
