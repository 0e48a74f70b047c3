"""`python -m bench.gpu`: what a new GPU is measured by, in one command.

__main__.py     the command line and the stages
run.py          a run's folder, its clock, and the processes that do its work
journal.py      rows that are on the disk as soon as they are made
tether.py       a process that ends with the one that started it
verify.py       a process: is a kernel right?
tuner.py        a process: how long do its configs take?
one_launch.py   a process: a kernel alone, for a profiler
page.py         gpu.md, made from the rows
carry.py        the files that are carried home from a lent machine
"""
