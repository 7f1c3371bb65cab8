"""The subcommands of coalescer-export, a module each."""
