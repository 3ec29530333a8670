//! The Open Inference Protocol v2 (KServe, Triton): `infer` with a BYTES tensor `text`, or with INT64 tensors
//! `input_ids` and, if rows are padded, `attention_mask`. What REST and gRPC share stands here.

pub mod grpc;
pub mod rest;
mod tensor;

use crate::engine::{Overlong, Sequence, Served};
use crate::http::App;
use crate::refusal::Refusal;
use quetsch::batch::Encoding;
use quetsch::metrics::top_k;
use quetsch::tokenizer::Cut;
use std::sync::Arc;
use tensor::{Data, Tensor, Values};

/// The one version of every model.
const VERSION: &str = "1";
/// The name of this server.
const SERVER: &str = "quetsch";
/// What it can do beyond the protocol.
const EXTENSIONS: [&str; 1] = ["binary_tensor_data"];
const OUTPUTS: [&str; 3] = ["label", "score", "logits"];

/// A request, whatever carried it.
struct Infer {
    /// How many labels a text; all, if it does not say.
    top_k: Option<usize>,
    inputs: Vec<Tensor>,
    /// Which outputs; all, if it does not say.
    wanted: Option<Vec<String>>,
}

/// One tensor of an answer.
struct Output {
    name: &'static str,
    datatype: &'static str,
    shape: [usize; 2],
    values: Values,
}

/// Name, datatype, shape of a tensor of a model; -1 is any size.
type Described = (&'static str, &'static str, Vec<i64>);

fn model(app: &App, name: &str, version: Option<&str>) -> Result<Arc<Served>, Refusal> {
    match version {
        None | Some("" | VERSION) => app.engine()?.model(name),
        Some(version) => Err(Refusal::UnknownModel(format!("{name} version {version}"))),
    }
}

fn inputs() -> Vec<Described> {
    let ids = |name| (name, "INT64", vec![-1, -1]);
    vec![("text", "BYTES", vec![-1]), ids("input_ids"), ids("attention_mask"), ids("token_type_ids")]
}

fn outputs(model: &Served) -> Vec<Described> {
    let [label, score, logits] = OUTPUTS;
    let labels = model.classifier.labels().len() as i64;
    vec![(label, "BYTES", vec![-1, -1]), (score, "FP32", vec![-1, -1]), (logits, "FP32", vec![-1, labels])]
}

async fn infer(app: &App, model: &Arc<Served>, request: Infer) -> Result<Vec<Output>, Refusal> {
    if let Some(name) = request.wanted.iter().flatten().find(|name| !OUTPUTS.contains(&name.as_str())) {
        return Err(Refusal::Shape(format!("there is no output `{name}`; there are {}", OUTPUTS.join(", "))));
    }
    let names = model.classifier.labels();
    let k = match request.top_k {
        Some(0) => return Err(Refusal::Shape("top_k: expected at least 1".into())),
        k => k.unwrap_or(names.len()).min(names.len()),
    };
    let engine = app.engine()?;
    let answers = match read(request.inputs)? {
        Inputs::Texts(texts) => {
            let overlong = if app.config.auto_truncate { Overlong::Cut(Cut::Right) } else { Overlong::Refuse };
            engine.classify(model, texts, overlong).await?
        }
        Inputs::Ids(encodings) => engine.classify_ids(model, encodings).await?,
    };
    let n = answers.logits.len();
    let (mut labels, mut scores) = (vec![], vec![]);
    for row in &answers.logits {
        let mut probabilities = row.clone();
        model.classifier.task().problem.scores(&mut probabilities);
        for i in top_k(row, k) {
            labels.push(names[i].clone());
            scores.push(probabilities[i]);
        }
    }
    let [label, score, logits] = OUTPUTS;
    let mut outputs = vec![
        Output { name: label, datatype: "BYTES", shape: [n, k], values: Values::Texts(labels) },
        Output { name: score, datatype: "FP32", shape: [n, k], values: Values::Floats(scores) },
        Output {
            name: logits,
            datatype: "FP32",
            shape: [n, names.len()],
            values: Values::Floats(answers.logits.concat()),
        },
    ];
    if let Some(wanted) = request.wanted {
        outputs.retain(|o| wanted.iter().any(|name| name == o.name));
    }
    Ok(outputs)
}

#[derive(Debug, PartialEq)]
enum Inputs {
    Texts(Vec<Sequence>),
    Ids(Vec<Encoding>),
}

/// The tensors of a request: `text`, or `input_ids` with what stands beside it.
fn read(tensors: Vec<Tensor>) -> Result<Inputs, Refusal> {
    let bad = |what: String| Err(Refusal::Shape(what));
    let known = ["text", "input_ids", "attention_mask", "token_type_ids"];
    if let Some(t) = tensors.iter().find(|t| !known.contains(&t.name.as_str())) {
        return bad(format!("there is no input `{}`; there are {}", t.name, known.join(", ")));
    }
    if let Some(i) = (1..tensors.len()).find(|&i| tensors[..i].iter().any(|t| t.name == tensors[i].name)) {
        return bad(format!("input `{}` is there twice", tensors[i].name));
    }
    let find = |name: &str| tensors.iter().find(|t| t.name == name);
    match (find("text"), find("input_ids")) {
        (Some(text), None) if tensors.len() == 1 => texts(text).map(Inputs::Texts),
        (None, Some(ids)) => rows(ids, find("attention_mask"), find("token_type_ids")).map(Inputs::Ids),
        _ => bad("expected either the input `text` alone, or `input_ids`".into()),
    }
}

fn texts(tensor: &Tensor) -> Result<Vec<Sequence>, Refusal> {
    if tensor.datatype != "BYTES" {
        return Err(tensor.refuse("expected datatype BYTES"));
    }
    if !matches!(tensor.shape.as_slice(), [_] | [_, 1]) {
        return Err(tensor.refuse("expected shape [n] or [n, 1]"));
    }
    tensor.check_count()?;
    match &tensor.data {
        Data::Texts(texts) => Ok(texts.iter().map(|t| Sequence { text: t.clone(), pair: None }).collect()),
        Data::Integers(none) if none.is_empty() => Err(Refusal::Empty),
        _ => Err(tensor.refuse("expected strings")),
    }
}

fn rows(ids: &Tensor, mask: Option<&Tensor>, types: Option<&Tensor>) -> Result<Vec<Encoding>, Refusal> {
    let &[n, width] = ids.shape.as_slice() else { return Err(ids.refuse("expected shape [n, tokens]")) };
    let integers = |t: &Tensor| -> Result<Vec<u32>, Refusal> {
        if !["INT64", "INT32"].contains(&t.datatype.as_str()) {
            return Err(t.refuse("expected datatype INT64"));
        }
        if t.shape != ids.shape {
            return Err(t.refuse("expected the shape of `input_ids`"));
        }
        t.check_count()?;
        let values = match &t.data {
            Data::Integers(values) => values.iter().map(|v| u32::try_from(*v).ok()).collect(),
            _ => None,
        };
        values.ok_or_else(|| t.refuse("expected integers from 0"))
    };
    let all = integers(ids)?;
    let mask = mask.map(integers).transpose()?.unwrap_or_else(|| vec![1; all.len()]);
    let types = types.map(integers).transpose()?;
    if mask.iter().any(|m| *m > 1) {
        return Err(Refusal::Shape("input `attention_mask`: expected 0 and 1".into()));
    }
    // They have been counted: n rows of `width` values. There is no padding here, so masked places go.
    let row = |r: usize| {
        let kept = || (r * width..(r + 1) * width).filter(|&i| mask[i] == 1);
        let ids = kept().map(|i| all[i]).collect();
        let types = types.as_ref().map(|t| kept().map(|i| t[i]).collect()).unwrap_or_default();
        Encoding { ids, types }
    };
    match all.is_empty() {
        true => Err(Refusal::Empty),
        false => Ok((0..n).map(row).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn tensors(json: Value) -> Result<Inputs, Refusal> {
        let tensor = |t: &Value| {
            let text = |i: usize| t[i].as_str().unwrap().to_owned();
            let shape = serde_json::from_value(t[2].clone()).unwrap();
            Ok(Tensor { name: text(0), datatype: text(1), shape, data: Data::from_json(&t[3])? })
        };
        read(json.as_array().unwrap().iter().map(tensor).collect::<Result<_, Refusal>>()?)
    }

    #[test]
    fn tensors_are_read_flat_and_nested() {
        let text = |texts: &[&str]| {
            Inputs::Texts(texts.iter().map(|t| Sequence { text: t.to_string(), pair: None }).collect())
        };
        let ids = |rows: &[(&[u32], &[u32])]| {
            Inputs::Ids(rows.iter().map(|(i, t)| Encoding { ids: i.to_vec(), types: t.to_vec() }).collect())
        };
        let rows = [
            (json!([["text", "BYTES", [2], ["a", "b"]]]), text(&["a", "b"])),
            (json!([["text", "BYTES", [2, 1], [["a"], ["b"]]]]), text(&["a", "b"])),
            (json!([["input_ids", "INT64", [2, 2], [[2, 3], [4, 5]]]]), ids(&[(&[2, 3], &[]), (&[4, 5], &[])])),
            (
                json!([
                    ["attention_mask", "INT64", [2, 2], [1, 1, 1, 0]],
                    ["input_ids", "INT64", [2, 2], [2, 3, 4, 0]],
                    ["token_type_ids", "INT64", [2, 2], [0, 1, 0, 0]]
                ]),
                ids(&[(&[2, 3], &[0, 1]), (&[4], &[0])]),
            ),
        ];
        for (json, want) in rows {
            assert_eq!(tensors(json.clone()), Ok(want), "{json}");
        }
    }

    #[test]
    fn wrong_tensors_are_refused() {
        let rows = [
            (json!([]), "either"),
            (json!([["text", "FP32", [1], ["a"]]]), "BYTES"),
            (json!([["text", "BYTES", [2], ["a"]]]), "does not hold"),
            (json!([["text", "BYTES", [1], "a"]]), "expected a list"),
            (json!([["text", "BYTES", [0], []]]), "cannot be empty"),
            (json!([["text", "BYTES", [1, 2], ["a", "b"]]]), "expected shape"),
            (json!([["text", "BYTES", [1], [7]]]), "strings"),
            (json!([["text", "BYTES", [2], ["a", 7]]]), "strings"),
            (json!([["text", "BYTES", [1], ["a"]], ["text", "BYTES", [1], ["a"]]]), "twice"),
            (json!([["text", "BYTES", [1], ["a"]], ["input_ids", "INT64", [1, 1], [2]]]), "either"),
            (json!([["words", "BYTES", [1], ["a"]]]), "no input"),
            (json!([["input_ids", "INT64", [1], [2]]]), "expected shape"),
            (json!([["input_ids", "INT64", [1, 1], [-2]]]), "integers"),
            (json!([["input_ids", "INT64", [1, 1], [1.5]]]), "integers"),
            (json!([["input_ids", "INT64", [1, 1], ["2"]]]), "integers"),
            (json!([["input_ids", "INT64", [u64::MAX, 2], [2]]]), "does not hold"),
            (json!([["input_ids", "INT64", [1000000000, 0], []]]), "cannot be empty"),
            (json!([["input_ids", "INT64", [1, 1], [2]], ["attention_mask", "INT64", [1, 1], [2]]]), "0 and 1"),
            (json!([["input_ids", "INT64", [1, 1], [2]], ["attention_mask", "INT64", [1], [1]]]), "the shape of"),
        ];
        for (json, want) in rows {
            let error = tensors(json.clone()).unwrap_err().to_string();
            assert!(error.contains(want), "{json}: {error}");
        }
    }
}
