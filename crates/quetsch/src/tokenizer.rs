//! Tokenisers of model directories.
