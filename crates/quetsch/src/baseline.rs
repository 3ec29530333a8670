//! The plain baseline a network has to beat: TF-IDF and one linear SVM a label.
//!
//! Features are words, pairs of words and the four-letter pieces of words with their ends (`" car"`, `"card"`,
//! `"ard "`), which forgive inflection and typing errors. Their values are
//! (1 + ln tf) * (ln((1 + n) / (1 + df)) + 1), each text scaled to length 1 (as scikit-learn's `TfidfVectorizer` with
//! `sublinear_tf`). Each SVM minimises |w|^2 / 2 + C sum max(0, 1 - y w.x)^2 with C = 1 by dual coordinate descent with
//! shrinking (Hsieh et al. 2008, liblinear's `L2R_L2LOSS_SVC_DUAL`). Same texts, same scores, whatever the number of
//! threads.

use std::collections::HashMap;

use crate::rng::Rng;

const C: f32 = 1.0;
/// The last pass is the one whose projected gradients lie this close together (liblinear's default).
const TOLERANCE: f32 = 0.1;
const MAX_PASSES: usize = 200;

/// (feature, value), by rising feature.
type Sparse = Vec<(u32, f32)>;

/// A fitted baseline.
pub struct TfIdf {
    /// What [`grams`] makes of a text -> its feature.
    vocabulary: HashMap<String, u32>,
    /// [features]
    idf: Vec<f32>,
    /// [features + 1, labels], the last row the bias.
    weights: Vec<f32>,
    n_labels: usize,
}

impl TfIdf {
    /// Fits on texts with their labels, all below `n_labels`.
    pub fn fit(texts: &[impl AsRef<str>], labels: &[u32], n_labels: usize) -> TfIdf {
        let mut vocabulary = HashMap::new();
        let mut df: Vec<u32> = Vec::new();
        for text in texts {
            let mut grams = grams(text.as_ref());
            grams.sort_unstable();
            grams.dedup();
            for gram in grams {
                let feature = *vocabulary.entry(gram).or_insert(df.len() as u32);
                df.resize(df.len().max(feature as usize + 1), 0);
                df[feature as usize] += 1;
            }
        }
        let n = texts.len() as f32;
        let idf: Vec<f32> = df.iter().map(|&df| ((1.0 + n) / (1.0 + df as f32)).ln() + 1.0).collect();
        let mut fitted = TfIdf { vocabulary, weights: vec![0.0; (idf.len() + 1) * n_labels], idf, n_labels };
        let rows: Vec<Sparse> = texts.iter().map(|text| fitted.with_bias(text.as_ref())).collect();

        let columns = fitted.idf.len() + 1;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let classes: Vec<u32> = (0..n_labels as u32).collect();
        let solve = |share: &[u32]| share.iter().map(|&c| svm(&rows, labels, c, columns)).collect::<Vec<_>>();
        let solved: Vec<Vec<f32>> = std::thread::scope(|scope| {
            let workers: Vec<_> = classes
                .chunks(n_labels.div_ceil(threads).max(1))
                .map(|share| scope.spawn(move || solve(share)))
                .collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
                .collect()
        });
        for (class, weights) in solved.into_iter().enumerate() {
            for (feature, weight) in weights.into_iter().enumerate() {
                fitted.weights[feature * n_labels + class] = weight;
            }
        }
        fitted
    }

    /// One score a label; the largest is the prediction. They are margins, not probabilities.
    pub fn scores(&self, text: &str) -> Vec<f32> {
        let mut scores = vec![0.0; self.n_labels];
        for (feature, value) in self.with_bias(text) {
            let weights = &self.weights[feature as usize * self.n_labels..][..self.n_labels];
            scores.iter_mut().zip(weights).for_each(|(score, weight)| *score += value * weight);
        }
        scores
    }

    /// The features of a text and a constant 1.
    fn with_bias(&self, text: &str) -> Sparse {
        let mut features: Vec<u32> =
            grams(text).iter().filter_map(|gram| self.vocabulary.get(gram).copied()).collect();
        features.sort_unstable();
        let weigh = |same: &[u32]| (same[0], (1.0 + (same.len() as f32).ln()) * self.idf[same[0] as usize]);
        let mut row: Sparse = features.chunk_by(|a, b| a == b).map(weigh).collect();
        let length = row.iter().map(|(_, value)| value * value).sum::<f32>().sqrt();
        row.iter_mut().for_each(|(_, value)| *value /= length);
        row.push((self.idf.len() as u32, 1.0));
        row
    }
}

/// The words of a text in lower case, their pairs, and their pieces, marked with `#`. Chinese and Japanese put no space
/// between words: there every ideograph counts as one.
fn grams(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let is_ideograph = |c: char| ('\u{3400}'..='\u{9fff}').contains(&c);
    let mut words: Vec<String> = Vec::new();
    let mut open = false;
    for c in text.chars() {
        match words.last_mut() {
            Some(word) if open && c.is_alphanumeric() && !is_ideograph(c) => word.push(c),
            _ if c.is_alphanumeric() => words.push(c.to_string()),
            _ => {}
        }
        open = c.is_alphanumeric() && !is_ideograph(c);
    }
    let mut grams: Vec<String> = words.windows(2).map(|pair| pair.join(" ")).collect();
    for word in &words {
        let letters: Vec<char> = format!(" {word} ").chars().collect();
        grams.extend(letters.windows(4).map(|piece| ['#'].iter().chain(piece).collect::<String>()));
    }
    grams.extend(words);
    grams
}

/// The weights that tell label `class` from the others.
fn svm(rows: &[Sparse], labels: &[u32], class: u32, columns: usize) -> Vec<f32> {
    let mut rng = Rng::new(u64::from(class));
    let mut weights = vec![0.0; columns];
    // What the squared hinge adds to the diagonal of the dual's matrix.
    let ridge = 1.0 / (2.0 * C);
    let diagonal: Vec<f32> = rows.iter().map(|row| row.iter().map(|(_, x)| x * x).sum::<f32>() + ridge).collect();
    let mut alpha = vec![0.0; rows.len()];
    let mut active: Vec<usize> = (0..rows.len()).collect();
    let mut ceiling = f32::INFINITY;
    for _ in 0..MAX_PASSES {
        rng.shuffle(&mut active);
        let (mut highest, mut lowest) = (0f32, 0f32);
        active.retain(|&i| {
            let sign = if labels[i] == class { 1.0 } else { -1.0 };
            let margin = rows[i].iter().map(|&(feature, x)| weights[feature as usize] * x).sum::<f32>() * sign;
            let gradient = margin - 1.0 + ridge * alpha[i];
            if alpha[i] == 0.0 && gradient >= 0.0 {
                // At its bound and pushed outwards: no step, and far enough out it will not come back.
                return gradient <= ceiling;
            }
            (highest, lowest) = (highest.max(gradient), lowest.min(gradient));
            let new = (alpha[i] - gradient / diagonal[i]).max(0.0);
            let step = (new - alpha[i]) * sign;
            alpha[i] = new;
            rows[i].iter().for_each(|&(feature, x)| weights[feature as usize] += step * x);
            true
        });
        if highest - lowest <= TOLERANCE {
            if active.len() == rows.len() {
                break;
            }
            // Done with those left: one look at all of them again.
            active = (0..rows.len()).collect();
            ceiling = f32::INFINITY;
        } else {
            ceiling = if highest > 0.0 { highest } else { f32::INFINITY };
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_pairs_and_pieces() {
        let table: [(&str, &[&str]); 4] = [
            ("Card, OK!", &["card ok", "# car", "#card", "#ard ", "# ok ", "card", "ok"]),
            ("", &[]),
            ("I 2", &["i 2", "i", "2"]),
            ("b我的c", &["b 我", "我 的", "的 c", "b", "我", "的", "c"]),
        ];
        for (text, expected) in table {
            assert_eq!(grams(text), expected, "{text}");
        }
    }

    #[test]
    fn learns_and_repeats_itself() {
        let texts: Vec<String> = (0..60)
            .map(|i| format!("{} number {i}", ["where is my card", "top up failed", "change the pin"][i % 3]))
            .collect();
        let labels: Vec<u32> = (0..60).map(|i| i % 3).collect();
        let fitted = TfIdf::fit(&texts, &labels, 4);
        let cases = [("My card?", 0), ("The top up has FAILED", 1), ("pin", 2)];
        for (text, label) in cases {
            let scores = fitted.scores(text);
            assert_eq!(crate::metrics::argmax(&scores), label, "{text}: {scores:?}");
            assert_eq!(scores, TfIdf::fit(&texts, &labels, 4).scores(text), "{text}");
        }
        assert!(fitted.scores("").iter().all(|score| score.is_finite()));
    }

    #[test]
    fn reaches_the_optimum() {
        // One feature and its bias, two rows: by symmetry w = a [2, 0] with a the dual variable of both rows, and
        // dD/da = 0: 2a - 1 + a / 2 = 0.
        let rows = vec![vec![(0, 1.0), (1, 1.0)], vec![(0, -1.0), (1, 1.0)]];
        let weights = svm(&rows, &[0, 1], 0, 2);
        assert!((weights[0] - 0.8).abs() < 0.05 && weights[1].abs() < 0.05, "{weights:?}");
    }
}
