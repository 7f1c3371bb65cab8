"""A gated activation, as in the feed-forward layers of transformers. Not a public op, see `ops.gate`."""
