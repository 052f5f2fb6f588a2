"""Checkers of histories: were the answers that clients got possible in a correct store?

`history` is the vocabulary and the file format, `verdict` what comes out, `file` checks a whole file.
Nothing here talks to a store, and nothing depends on time other than to give up at a deadline.
"""
