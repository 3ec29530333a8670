//! The plain baseline: TF-IDF and a linear classifier.
