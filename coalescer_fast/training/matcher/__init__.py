"""Training of `DescriptionEncoder.match`: which known name a free wording means.

The truth is a sentence transformer (all-MiniLM-L6-v2, Apache-2.0) that reads names, their keywords and WordNet's
glosses; it is too slow for the request path. What is shipped is made of it: a table of one row a token with a vector a
name, trained on what the transformer says of words and phrases, and a lexicon, its answers for single entries of
WordNet 3.0 (Princeton University) and of Unicode CLDR in several languages.

    python -m coalescer_fast.training.matcher --data emoji_64.npz --model-dir MINILM --wordnet DIR --out FOLDER
"""
