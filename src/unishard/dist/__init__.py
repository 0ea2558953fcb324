"""Process groups, meshes and collectives: everything that talks to other ranks."""
