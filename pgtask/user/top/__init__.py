"""`pgtask top`: the command (`main`), what is read (`look`), and how it reads (`words`, `views`, `summary`).

It is shown as a page of text (`page`), or on a terminal (`screen`, the only one that needs a terminal library).
"""
