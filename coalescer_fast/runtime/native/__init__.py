"""Native programs: what a torch module does as steps of the CPU library, with memory laid out once, run in a single call."""
