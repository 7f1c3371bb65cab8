"""Native programs: what a torch module does, as steps of the CPU library, run in a single call."""
