"""Dataset files: from any form to records, from records to what is trained."""
