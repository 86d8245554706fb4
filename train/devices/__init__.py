"""The machine: its devices as a mesh, its cores and memory, and the other hosts."""
