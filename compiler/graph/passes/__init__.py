"""The rewrites of the graphs, each a small function; compiler/pipeline.py has their order and reasons."""
