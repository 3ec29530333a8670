//! Giving a body a classification head: where fine-tuning starts.

use crate::checkpoint::{Checkpoint, Stored};
use crate::error::{Error, Result};
use crate::rng::Rng;
use crate::spec::{HeadSpec, Lin, Tensor};

/// The kinds of head that Quetsch makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    /// `StudentHFModel`: mean pool, Linear + GELU, Linear.
    Mean,
    /// The family's own `ForSequenceClassification`; BERT's: first token, pooler + tanh, classifier.
    Pooler,
    /// `..ForTokenClassification`: the classifier on every token.
    Tokens,
}

/// `model` with a head for these labels. A head that is there and fits (same kind, same labels in the same order) is
/// kept; otherwise its weights are N(0, 0.02), as transformers initialises new heads. A pooler that the body brings
/// becomes the hidden layer of BERT's own head and stays beside a mean head; a hidden layer of the same kind is kept
/// under other labels.
///
/// # Errors
/// No label, or a label given twice.
pub fn with_head(model: &Checkpoint, kind: HeadKind, labels: Vec<String>, seed: u64) -> Result<Checkpoint> {
    if labels.is_empty() {
        return Err(Error::invalid("a classification head needs at least one label"));
    }
    if let Some(twice) = labels.iter().enumerate().find(|(i, l)| labels[..*i].contains(l)) {
        return Err(Error::invalid(format!("label {:?} is given twice", twice.1)));
    }
    let old = &model.spec;
    let head = match kind {
        HeadKind::Mean => HeadSpec::MeanMlp { labels: labels.len() },
        HeadKind::Pooler => HeadSpec::Pooler { labels: labels.len() },
        HeadKind::Tokens => HeadSpec::Tokens { labels: labels.len() },
    };
    if old.head == head && model.labels == labels {
        return Ok(model.clone());
    }
    let facts = old.family.facts();
    let is_stock = matches!(old.head, HeadSpec::Pooler { .. });
    let pooler = match old.unused_pooler {
        true => Some(Lin::UnusedPooler),
        false if is_stock && facts.head_is_pooler() => Some(Lin::HeadDense),
        false => None,
    };
    let dense = match is_stock {
        true => Some(Lin::HeadDense),
        false => pooler.filter(|_| facts.head_is_pooler()),
    };
    let mut spec = old.clone();
    spec.head = head;
    (spec.prefix, spec.unused_pooler) = match kind {
        HeadKind::Mean => ("backbone.".to_string(), pooler.is_some()),
        HeadKind::Pooler | HeadKind::Tokens => (facts.prefix.to_string(), false),
    };
    let source = |s: Lin| match (kind, s) {
        (HeadKind::Mean, Lin::UnusedPooler) => pooler,
        (HeadKind::Pooler, Lin::HeadDense) => dense,
        (_, Lin::HeadDense | Lin::Classifier) => None,
        (_, s) => Some(s),
    };
    let mut rng = Rng::new(seed);
    let mut new = Checkpoint::from_fn(spec, labels, |def| {
        let from = match def.tensor {
            Tensor::W(s) => source(s).map(Tensor::W),
            Tensor::B(s) => source(s).map(Tensor::B),
            t => Some(t),
        };
        Ok(match (from, def.tensor) {
            (Some(t), _) => Stored::f32(model.values(t).into_owned()),
            (None, Tensor::W(_)) => Stored::f32((0..def.len()).map(|_| 0.02 * rng.normal()).collect()),
            (None, _) => Stored::f32(vec![0.0; def.len()]),
        })
    })?;
    new.max_length = model.max_length;
    new.config.clone_from(&model.config);
    // These say what the old head was.
    for key in ["architectures", "id2label", "label2id", "num_labels", "problem_type"] {
        new.config.shift_remove(key);
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Activation, Family, LayerShape, ModelSpec};

    #[test]
    fn heads_come_and_go_and_the_body_stays() {
        let body = ModelSpec {
            family: Family::Bert,
            prefix: String::new(),
            vocab: 9,
            positions: 8,
            token_types: 2,
            hidden: 8,
            head_dim: 4,
            original_heads: 2,
            layers: vec![LayerShape { heads: vec![0, 1], ffn: 6 }],
            ffn_activation: Activation::Gelu,
            norm_eps: 1e-12,
            head: HeadSpec::None,
            unused_pooler: true,
        };
        let body = Checkpoint::random(body, vec![], 1).unwrap();
        let labels = |n: usize| (0..n).map(|i| format!("l{i}")).collect::<Vec<_>>();
        let mean = with_head(&body, HeadKind::Mean, labels(3), 2).unwrap();
        assert_eq!(mean.spec.prefix, "backbone.");
        assert_eq!(mean.values(Tensor::Word), body.values(Tensor::Word));
        let pooler = body.values(Tensor::W(Lin::UnusedPooler)).into_owned();
        assert_eq!(mean.values(Tensor::W(Lin::UnusedPooler)), pooler);
        assert!(mean.values(Tensor::W(Lin::HeadDense)).iter().any(|v| *v != 0.0));
        let stock = with_head(&mean, HeadKind::Pooler, labels(2), 2).unwrap();
        assert_eq!(stock.values(Tensor::W(Lin::HeadDense)), pooler);
        assert_eq!(stock.spec.tensors().last().unwrap().shape, [2]);
        let same = with_head(&stock, HeadKind::Pooler, labels(2), 99).unwrap();
        assert_eq!(same.values(Tensor::W(Lin::Classifier)), stock.values(Tensor::W(Lin::Classifier)));
        let tokens = with_head(&mean, HeadKind::Tokens, labels(4), 2).unwrap();
        let last: Vec<_> = tokens.spec.tensors().into_iter().rev().take(2).map(|d| (d.name, d.shape)).collect();
        assert_eq!(last, [("classifier.bias".to_string(), vec![4]), ("classifier.weight".to_string(), vec![4, 8])]);
        assert_eq!(tokens.values(Tensor::Word), body.values(Tensor::Word));
        assert!(with_head(&body, HeadKind::Mean, vec!["a".into(), "a".into()], 1).is_err());
        assert!(with_head(&body, HeadKind::Mean, vec![], 1).is_err());
    }
}
