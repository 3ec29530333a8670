//! The part of a card on loading: which program reads these shapes and schemes, and what to do where none does.

use super::add;
use serde_json::{Map, Value};

/// What config.json says about loading a model.
pub struct Model {
    /// The class of its kind.
    pub architecture: String,
    /// Labels, or outputs.
    pub labels: usize,
    /// Heads and feed-forward width of every layer; empty where our key is not there.
    pub layers: Vec<(usize, u64)>,
    /// Heads of a layer before any was cut.
    heads: usize,
    /// Schemes of linears.
    pub schemes: Vec<String>,
    /// Schemes of embedding tables.
    tables: Vec<String>,
    /// Whether Python code stands beside the weights.
    code: bool,
}

impl Model {
    /// From config.json.
    pub fn new(config: &Value) -> Model {
        let number = |keys: &[&str]| keys.iter().find_map(|k| config[*k].as_u64()).unwrap_or(0);
        let heads = number(&["num_attention_heads", "n_heads"]) as usize;
        let ours = &config["quetsch"];
        let own: Vec<(usize, u64)> = ours["layers"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|l| (l["heads"].as_array().map_or(heads, Vec::len), l["ffn"].as_u64().unwrap_or(0)))
            .collect();
        let width = number(&["intermediate_size", "hidden_dim"]);
        let layers = match own.is_empty() {
            true => vec![(heads, width); number(&["num_hidden_layers", "n_layers"]) as usize],
            false => own,
        };
        let (mut schemes, mut tables) = (vec![], vec![]);
        for (site, scheme) in ours["sites"].as_object().into_iter().flatten() {
            let list = if site.contains("embeddings.") { &mut tables } else { &mut schemes };
            add(list, scheme.as_str().unwrap_or_default().to_string());
        }
        Model {
            architecture: config["architectures"][0].as_str().unwrap_or("A model").to_string(),
            labels: config["id2label"].as_object().map_or(0, Map::len),
            layers,
            heads,
            schemes,
            tables,
            code: config["auto_map"].is_object(),
        }
    }

    /// The hub's name of the task.
    pub fn pipeline(&self) -> &'static str {
        match self.architecture.ends_with("ForTokenClassification") {
            true => "token-classification",
            false => "text-classification",
        }
    }

    /// How weights are stored, in words.
    pub fn storage(&self) -> String {
        let parts = |list: &Vec<String>| list.join(", ");
        match (self.schemes.is_empty(), self.tables.is_empty()) {
            (true, true) => "weights as floats".into(),
            (false, true) => format!("linears as {}", parts(&self.schemes)),
            (true, false) => format!("embedding tables as {}", parts(&self.tables)),
            (false, false) => {
                format!("linears as {}, embedding tables as {}", parts(&self.schemes), parts(&self.tables))
            }
        }
    }

    fn has_cut_heads(&self) -> bool {
        self.layers.iter().any(|(heads, _)| *heads != self.heads)
    }

    fn is_uneven(&self) -> bool {
        self.layers.iter().any(|(heads, ffn)| *heads == 0 || *ffn != self.layers[0].1)
    }

    fn is_student(&self) -> bool {
        self.architecture == "StudentHFModel"
    }

    /// Whether transformers loads it with its own classes, and computes with what is stored.
    pub fn is_stock(&self) -> bool {
        let shapes = !self.has_cut_heads() && !self.is_uneven() && !self.is_student();
        (shapes || self.code) && (!self.is_quantised() || self.is_bitsandbytes())
    }

    /// Whether inputs have ranges that were found by calibration.
    pub fn is_static(&self) -> bool {
        self.schemes.iter().any(|scheme| scheme == "int8-static")
    }

    /// Whether any weight is quantised.
    pub fn is_quantised(&self) -> bool {
        !self.schemes.is_empty() || !self.tables.is_empty()
    }

    /// Whether bitsandbytes reads all that is quantised, and computes it so.
    pub fn is_bitsandbytes(&self) -> bool {
        !self.schemes.is_empty() && self.tables.is_empty() && self.own_schemes().is_empty() && !self.is_mixed()
    }

    /// Whether int8 and 4-bit linears stand in one file.
    fn is_mixed(&self) -> bool {
        let four = self.schemes.iter().filter(|s| matches!(s.as_str(), "nf4" | "fp4")).count();
        four > 0 && four < self.schemes.len()
    }

    /// Schemes of ours that bitsandbytes computes otherwise.
    fn own_schemes(&self) -> Vec<&str> {
        let own = |s: &&String| matches!(s.as_str(), "int8" | "int8-static" | "int8-weight");
        self.schemes.iter().filter(own).map(String::as_str).collect()
    }

    /// The section on loading.
    pub fn loading(&self) -> String {
        let class = match self.pipeline() {
            "token-classification" => "AutoModelForTokenClassification",
            _ => "AutoModelForSequenceClassification",
        };
        let mut text = "## How to load it\n\nDIR is a folder with the files of this model.\n\n    quetsch predict --model DIR \
                        \"a text\"\n    quetsch serve --model DIR\n\n"
            .to_string();
        let mut hints = vec![];
        if self.code {
            text += &format!("    {class}.from_pretrained(DIR, trust_remote_code=True)\n\n");
            hints.push("transformers runs `modeling_quetsch.py` of this folder: read it first.".into());
        } else if self.is_student() {
            hints.push(
                "transformers has no class `StudentHFModel` of its own: `quetsch export --model DIR --to hf --layout \
                 remote-code --out NEW` writes a folder that loads with `trust_remote_code=True`."
                    .to_string(),
            );
        } else if self.is_uneven() {
            hints.push(
                "transformers cannot load these shapes (layers of different widths, or without heads): `quetsch export \
                 --model DIR --to hf --layout dense --out NEW` writes the parts that were cut back as zeros."
                    .to_string(),
            );
        } else if self.tables.is_empty() && !self.is_mixed() {
            text += &format!("    {class}.from_pretrained(DIR)   # transformers\n\n");
            if self.has_cut_heads() {
                hints.push(
                    "Attention heads are cut: transformers 4 reads that, transformers 5 does not; for it `quetsch export \
                     --model DIR --to hf --layout dense --out NEW` writes them back as zeros."
                        .to_string(),
                );
            }
        }
        if self.is_mixed() {
            hints.push(
                "No other program reads int8 and 4-bit linears in one file: `quetsch export --to bnb-int8` (or `bnb-nf4`) \
                 writes all in one scheme."
                    .to_string(),
            );
        } else if !self.schemes.is_empty() {
            hints.push("transformers needs bitsandbytes for the quantised linears.".to_string());
        }
        let own = self.own_schemes();
        if !own.is_empty() {
            let list = own.join(", ");
            hints.push(format!(
                "{list}: bitsandbytes computes the same weights as LLM.int8(), so answers may differ a little."
            ));
        }
        if !self.tables.is_empty() {
            hints.push(
                "No other program reads quantised embedding tables: `quetsch export` decodes them.".to_string(),
            );
        }
        hints.iter().for_each(|hint| text += &format!("- {hint}\n"));
        if !hints.is_empty() {
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(more: Value) -> Value {
        let mut config = json!({ "architectures": ["BertForSequenceClassification"], "num_attention_heads": 4,
            "num_hidden_layers": 2, "intermediate_size": 64, "id2label": { "0": "a", "1": "b" } });
        config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        config
    }

    #[test]
    fn loading_is_told_by_what_is_stored() {
        let layers = |l: [(&[u16], u64); 2]| json!(l.map(|(heads, ffn)| json!({ "heads": heads, "ffn": ffn })));
        let all: &[u16] = &[0, 1, 2, 3];
        let rows = [
            (json!({}), "from_pretrained(DIR)", "- "),
            (
                json!({ "quetsch": { "layers": layers([(all, 64), (&[0], 64)]) } }),
                "transformers 5 does not",
                "cannot load",
            ),
            (
                json!({ "quetsch": { "layers": layers([(all, 64), (all, 32)]) } }),
                "cannot load",
                "from_pretrained(DIR)",
            ),
            (
                json!({ "quetsch": { "layers": layers([(all, 64), (&[], 64)]) } }),
                "cannot load",
                "from_pretrained(DIR)",
            ),
            (json!({ "architectures": ["StudentHFModel"] }), "--layout remote-code", "from_pretrained(DIR)"),
            (json!({ "auto_map": {} }), "from_pretrained(DIR, trust_remote_code=True)", "--layout"),
            (json!({ "quetsch": { "sites": { "classifier": "nf4" } } }), "needs bitsandbytes", "LLM.int8()"),
            (json!({ "quetsch": { "sites": { "classifier": "int8" } } }), "as LLM.int8()", "No other program"),
            (
                json!({ "quetsch": { "sites": { "classifier": "bnb-int8", "bert.pooler.dense": "nf4" } } }),
                "No other program reads int8 and 4-bit",
                "from_pretrained(DIR)",
            ),
            (
                json!({ "quetsch": { "sites": { "bert.embeddings.word_embeddings": "int8" } } }),
                "No other program",
                "from_pretrained(DIR)",
            ),
        ];
        for (more, has, lacks) in rows {
            let text = Model::new(&config(more.clone())).loading();
            assert!(text.contains(has), "{more}: {has:?} is not in\n{text}");
            assert!(!text.contains(lacks), "{more}: {lacks:?} is in\n{text}");
        }
    }
}
