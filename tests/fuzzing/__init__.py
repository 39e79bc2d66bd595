"""Readers of files that a stranger may have written, fed with damaged and hostile ones.

`inputs` makes the files, `readers` names what reads them, `watch` says what must not happen. `python -m fuzzing` runs
all of them.
"""
