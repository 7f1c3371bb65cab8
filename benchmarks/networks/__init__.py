"""Benchmark of other people's networks: diffusers' UNets and decoders, each provider in a process of its own."""
