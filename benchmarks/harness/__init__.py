"""What every family of benchmarks is made of."""
