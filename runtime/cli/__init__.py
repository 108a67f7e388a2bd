"""The command line, below `runtime/__main__.py`: the verbs, what their words mean, and what is done with them.

`arguments` reads words; `verbs` is the table of those that make a video, and `making` makes it; `builds` is the build
verb, `remote` asks another machine, `progress` shows how far it is.
"""
