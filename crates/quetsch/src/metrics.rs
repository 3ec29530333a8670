//! How good a classifier is: accuracy, F1, agreement, paired tests.
