"""Makes pieces of text from documents, in a process with limits.

- `reader` is the way in: it asks `process`, which starts and ends `worker`, the program with the limits.
- `kinds` recognises what a file is; `text`, `headings`, `html`, `pdf` and `office` make sections from it (`parsed`).
- `splitting` makes pieces from sections, and `strips` sentences from pieces.
"""
