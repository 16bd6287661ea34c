"""Words of texts and queries for the lexical search: folded, stemmed, cut into character n-grams. Knows no database and no torch."""
