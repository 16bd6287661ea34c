"""Documents of any format to one text to cite from, with its pages and headings; each is read in a confined child process."""
