//! Classifies texts with a model directory: `cargo run --release -p quetsch --example classify -- DIR TEXT..`

use quetsch::metrics::{softmax, top_k};
use quetsch::runtime::Classifier;
use std::path::Path;

fn main() -> quetsch::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, texts @ ..] = args.as_slice() else {
        eprintln!("usage: classify DIR TEXT..");
        return Ok(());
    };
    let classifier = Classifier::load(Path::new(dir), None)?;
    let labels = classifier.labels();
    let mut logits = classifier.logits(texts, 2)?; // [texts, labels], on 2 threads
    for (text, row) in texts.iter().zip(logits.chunks_mut(labels.len())) {
        softmax(row);
        println!("{text}");
        for i in top_k(row, 3) {
            println!("  {:.3} {}", row[i], labels[i]);
        }
    }
    Ok(())
}
