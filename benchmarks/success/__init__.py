"""Success of policies with and without LARA in Meta-World."""
