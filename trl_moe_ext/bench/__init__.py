"""`trl-moe bench`: speed, memory and accuracy of expert LoRA beside the frozen model and stock PEFT, in one run.

plan                        what is asked for
shapes, subjects, build     what is measured: experts alone, a decoder layer, a whole checkpoint
peers                       the ways to adapt it that are compared
fit, available              what will not fit in memory is refused, with a figure
run, process                a fresh process for each measurement, in interleaved rounds
measure, memory             what such a process does: time and memory of steps
accuracy, factors           or the errors of the gradients
results, table, plot        the figures, and how they are told
check, cases, tolerances    every kernel against the reference, on the device at hand
"""
