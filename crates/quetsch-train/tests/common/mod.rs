//! Fixtures and small models for the tests of training.
#![allow(clippy::unwrap_used)] // helpers of tests are tests too
#![allow(dead_code)] // each test file uses its share

use quetsch::batch::Encoding;
use quetsch::checkpoint::{Checkpoint, Stored};
use quetsch::spec::{Activation, Family, HeadSpec, LayerShape, ModelSpec, RobertaLike, Tensor, TensorDef};
use quetsch_train::{Dropout, FitSettings, Precision, Schedule, Sparsity};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::PathBuf;

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// What PyTorch wrote (scripts/make_fixtures.py).
pub struct Golden {
    pub json: Value,
    bytes: Vec<u8>,
    pub spec: ModelSpec,
    pub encodings: Vec<Encoding>,
    pub labels: Vec<u32>,
}

impl Golden {
    pub fn load(name: &str) -> Golden {
        let json: Value =
            serde_json::from_slice(&std::fs::read(fixture(&format!("gradients/{name}.json"))).unwrap()).unwrap();
        let bytes = std::fs::read(fixture(&format!("gradients/{name}.safetensors"))).unwrap();
        let s = &json["spec"];
        let int = |key: &str| s[key].as_u64().unwrap() as usize;
        let labels = int("labels");
        let layer = |l: &Value| LayerShape {
            heads: l["heads"].as_array().unwrap().iter().map(|h| h.as_u64().unwrap() as u16).collect(),
            ffn: l["ffn"].as_u64().unwrap() as usize,
        };
        let spec = ModelSpec {
            family: Family::Bert,
            prefix: s["prefix"].as_str().unwrap().into(),
            vocab: int("vocab"),
            positions: int("positions"),
            token_types: int("token_types"),
            hidden: int("hidden"),
            head_dim: int("head_dim"),
            original_heads: int("original_heads") as u16,
            layers: s["layers"].as_array().unwrap().iter().map(layer).collect(),
            ffn_activation: Activation::Gelu,
            norm_eps: s["norm_eps"].as_f64().unwrap() as f32,
            head: if name == "student" { HeadSpec::MeanMlp { labels } } else { HeadSpec::Pooler { labels } },
            unused_pooler: false,
        };
        let rows = |key: &str| -> Vec<Vec<u32>> { serde_json::from_value(json["batch"][key].clone()).unwrap() };
        let encodings =
            rows("ids").into_iter().zip(rows("types")).map(|(ids, types)| Encoding { ids, types }).collect();
        let labels = serde_json::from_value(json["batch"]["labels"].clone()).unwrap();
        Golden { json, bytes, spec, encodings, labels }
    }

    pub fn tensor(&self, name: &str) -> Vec<f32> {
        let t = SafeTensors::deserialize(&self.bytes).unwrap();
        let data = t.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec();
        data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub fn checkpoint(&self) -> Checkpoint {
        let labels = (0..self.spec.head.labels()).map(|i| format!("l{i}")).collect();
        Checkpoint::from_fn(self.spec.clone(), labels, |d| Ok(Stored::f32(self.tensor(&format!("w.{}", d.name)))))
            .unwrap()
    }
}

pub fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Uneven on purpose: three heads, none, one; the FFN widths differ; hidden != heads * head_dim.
pub fn uneven(head: HeadSpec) -> ModelSpec {
    let layer = |heads: &[u16], ffn| LayerShape { heads: heads.to_vec(), ffn };
    ModelSpec {
        family: Family::Bert,
        prefix: "bert.".into(),
        vocab: 30,
        positions: 16,
        token_types: 2,
        hidden: 24,
        head_dim: 8,
        original_heads: 6,
        layers: vec![layer(&[0, 2, 5], 20), layer(&[], 12), layer(&[3], 8)],
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head,
        unused_pooler: false,
    }
}

/// The families, each with what only it can vary.
pub const FAMILIES: [Family; 4] = [
    Family::Bert,
    Family::DistilBert,
    Family::Roberta { of: RobertaLike::XlmRoberta, pad: 1 },
    Family::Electra { embedding: 10 },
];

/// The same shape in another family.
pub fn in_family(spec: ModelSpec, family: Family) -> ModelSpec {
    let token_types = match family {
        Family::Bert | Family::Electra { .. } => spec.token_types,
        Family::Roberta { .. } => 1,
        Family::DistilBert => 0,
    };
    let prefix = if spec.prefix == "bert." { family.facts().prefix.to_owned() } else { spec.prefix };
    ModelSpec { family, prefix, token_types, positions: spec.positions + family.unused_positions(), ..spec }
}

/// Random weights large enough that every path matters.
pub fn lively(spec: ModelSpec, seed: u64) -> Checkpoint {
    let labels = (0..spec.head.labels()).map(|i| format!("l{i}")).collect();
    let mut rng = quetsch::rng::Rng::new(seed);
    Checkpoint::from_fn(spec, labels, |d: &TensorDef| {
        let near = if matches!(d.tensor, Tensor::Gamma(_)) { 1.0 } else { 0.0 };
        Ok(Stored::f32((0..d.len()).map(|_| near + 0.25 * rng.normal()).collect()))
    })
    .unwrap()
}

pub fn sentences(n: usize, vocab: u32, seed: u64) -> Vec<Encoding> {
    let mut rng = quetsch::rng::Rng::new(seed);
    let one = |_| {
        let len = 1 + rng.below(9);
        let ids = (0..len).map(|_| rng.below(vocab as usize) as u32).collect();
        let types = (0..len).map(|_| rng.below(2) as u32).collect();
        Encoding { ids, types }
    };
    (0..n).map(one).collect()
}

pub fn settings() -> FitSettings {
    FitSettings {
        epochs: 2,
        batch_size: 8,
        accumulate: 1,
        learning_rate: 1e-3,
        head_learning_rate: 2e-3,
        weight_decay: 0.01,
        warmup: 0.1,
        schedule: Schedule::Linear,
        clip: 1.0,
        dropout: Dropout { hidden: 0.1, attention: 0.1, head: 0.2 },
        freeze: vec![],
        seed: 7,
        threads: 2,
        sparsity: Sparsity::Free,
        recompute: false,
        quant: None,
        precision: Precision::F32,
    }
}
