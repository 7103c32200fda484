"""Perplexity after training, method against method: same model, tokens and data order, the same learning rates tried for each.

    python -m benchmarks.study --list                      # the studies, and which of their runs are still missing
    python -m benchmarks.study ternary --minutes 60        # runs what is missing, for about an hour
    python -m benchmarks.study ternary channel --table     # the tables of what has been run

How: text of novels/train.txt; every figure is of novels/valid.txt, another book, over full precision there. The learning rate
is chosen on half of that book (seed 0) and the other half is reported, both ways round: no text has a say in the rate that it
is reported at. (On the teacher's own text lower rates win, because they keep what it knows by heart; on Wikipedia, which is
far away, higher ones do.) The other seeds run at what was chosen. Seeds are paired: they draw the same batches
for every arm with the same batch size and text. Measured is the packed model, saved and loaded again, in float32. Tokens are
positions that pass through the student in training; an arm that fits its start on calibration text trains that much less.
Seconds count the text that a teacher writes, which is kept beside the results for the next run.
"""
