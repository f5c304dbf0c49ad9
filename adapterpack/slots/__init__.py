"""The contract between a graph and the runtime: which slots a site has, and what fills them."""
