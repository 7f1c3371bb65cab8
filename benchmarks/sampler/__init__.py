"""The whole sampler, accelerated, beside other ways to run the same networks."""
