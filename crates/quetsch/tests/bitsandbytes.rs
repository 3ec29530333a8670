//! Byte equality with bitsandbytes 0.50.2 on a CPU. `fixtures/bnb_vectors.safetensors`: single matrices through its
//! functions; `fixtures/bnb/*`: `fixtures/tiny_student` quantised by transformers 4.57.6; `fixtures/five/*`:
//! `fixtures/five/float` quantised by transformers 5.23.0.

#![allow(clippy::unwrap_used)] // helpers of tests are tests too

use quetsch::batch::Encoding;
use quetsch::checkpoint::{Checkpoint, FloatType, Stored};
use quetsch::dir::{self, ModelDir, Source};
use quetsch::quant::four_bit::BLOCK;
use quetsch::quant::{Absmax, Compute, FourBit, FourBitKind, FourBitOptions, Int8Input, Int8Rows, Scheme};
use quetsch::quant::{default_keep, quantise};
use quetsch::runtime::{Arithmetic, Model};
use quetsch::spec::{Lin, Tensor};
use quetsch::tokenizer::TokenizerFiles;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

struct Tensors(Vec<u8>);

impl Tensors {
    fn read(path: impl AsRef<Path>) -> Tensors {
        Tensors(std::fs::read(path).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        safetensors::SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

const MATRICES: [(&str, usize); 3] = [("odd_5x30", 30), ("outlier_64x64", 64), ("zeros_block_4x64", 64)];

#[test]
fn four_bit_matrices() {
    let v = Tensors::read(fixture("bnb_vectors.safetensors"));
    for ((matrix, _), (name, kind)) in MATRICES.into_iter().flat_map(|m| KINDS.map(|k| (m, k))) {
        assert_eq!(bits(&kind.map()), bits(&v.f32s(&format!("{name}_code"))), "{name}");
        let w = v.f32s(&format!("{matrix}.w"));
        let options = |double_quant, source| FourBitOptions {
            kind,
            double_quant,
            source,
            compute: Compute::F32,
            block: BLOCK,
        };
        let plain = FourBit::encode(&w, options(false, FloatType::F32));
        let at = |part: &str| format!("{matrix}.{name}.{part}");
        assert_eq!(plain.packed, v.bytes(&at("sq.packed")), "{matrix} {name}");
        assert_eq!(plain.absmax, Absmax::Plain(v.f32s(&at("sq.absmax"))), "{matrix} {name}");
        assert_eq!(bits(&plain.dequantise()), bits(&v.f32s(&at("sq.dequant"))), "{matrix} {name}");
        let mut cases = vec![("dq", FloatType::F32)];
        if kind == FourBitKind::Nf4 {
            cases.extend([("dq.from_fp16", FloatType::F16), ("dq.from_bf16", FloatType::Bf16)]);
        }
        for (case, source) in cases {
            let q = FourBit::encode(&w, options(true, source));
            assert_eq!(q.packed, v.bytes(&at(&format!("{case}.packed"))), "{matrix} {name} {case}");
            assert_eq!(
                bits(&q.dequantise()),
                bits(&v.f32s(&at(&format!("{case}.dequant")))),
                "{matrix} {name} {case}"
            );
            let Absmax::Nested { codes, map, nested_absmax, offset, .. } = q.absmax else { panic!("not nested") };
            assert_eq!(codes, v.bytes(&at(&format!("{case}.absmax"))), "{matrix} {name} {case}");
            assert_eq!(bits(&map), bits(&v.f32s("nested_code")));
            if case == "dq" {
                assert_eq!(bits(&nested_absmax), bits(&v.f32s(&at("dq.nested_absmax"))), "{matrix} {name}");
                assert_eq!(bits(&[offset]), bits(&v.f32s(&at("dq.offset"))), "{matrix} {name}");
            }
        }
    }
}

#[test]
fn int8_matrices() {
    let v = Tensors::read(fixture("bnb_vectors.safetensors"));
    for (matrix, columns) in MATRICES {
        let q = Int8Rows::encode(&v.f32s(&format!("{matrix}.w")), columns, Int8Input::Dynamic);
        let values: Vec<u8> = q.values.iter().map(|&q| q as u8).collect();
        assert_eq!(values, v.bytes(&format!("{matrix}.int8.from_fp16.CB")), "{matrix}");
        assert_eq!(bits(&q.scb), bits(&v.f32s(&format!("{matrix}.int8.from_fp16.SCB"))), "{matrix}");
    }
}

#[test]
fn whole_files_to_the_byte() {
    let nf4 = |double_quant, compute, source| Scheme::Nf4 { double_quant, compute, source };
    let fp4 = |double_quant, compute, source| Scheme::Fp4 { double_quant, compute, source };
    let int8 = Scheme::BnbInt8 { threshold: 6.0 };
    for (name, scheme) in [
        ("bnb/int8", int8),
        ("bnb/nf4", nf4(true, Compute::Bf16, None)),
        ("bnb/nf4_single", nf4(false, Compute::Bf16, None)),
        ("bnb/fp4", fp4(false, Compute::F32, None)),
        ("five/int8", int8),
        ("five/nf4", nf4(true, Compute::Bf16, None)),
        ("five/fp4", fp4(false, Compute::F32, Some(FloatType::F32))),
    ] {
        whole_file(name, &[("*".to_owned(), scheme)]);
    }
    // Loaded by transformers in half precision: what stays float is stored so, and 4-bit blocks are made from it.
    for (name, half) in [("f16", FloatType::F16), ("bf16", FloatType::Bf16)] {
        let dense = ("*".to_owned(), name.parse().unwrap());
        let sourced = [nf4(true, half, Some(half)), fp4(false, half, Some(half))];
        for (kind, scheme) in ["nf4", "fp4"].into_iter().zip(sourced) {
            whole_file(&format!("five/{kind}_{name}"), &[dense.clone(), ("*".to_owned(), scheme)]);
        }
    }
}

/// What quantising a fixture's float model by these rules writes is the fixture, and both read back as what was written.
fn whole_file(name: &str, rules: &[(String, Scheme)]) {
    let theirs = fixture(name);
    let source = if name.starts_with("five") { "five/float" } else { "tiny_student" };
    let source = dir::read_checkpoint(fixture(source)).unwrap();
    let checkpoint = quantise(&source, rules, &default_keep(&source.spec)).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("model");
    let model = ModelDir { checkpoint, tokenizer: TokenizerFiles::default() };
    dir::write(&out, &model, false).unwrap();
    let file = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(file(&out) == file(&theirs), "{name}: bytes differ");
    // Only of weights that decode to f32.
    let dequantised = theirs.join("dequantised.safetensors");
    let dequantised = dequantised.exists().then(|| Tensors::read(dequantised));
    for path in [theirs, out] {
        let read = dir::read_checkpoint(&path).unwrap();
        for ((def, ours), (_, stored)) in model.checkpoint.tensors().zip(read.tensors()) {
            assert_eq!(ours, stored, "{name} {}", def.name);
            if let (Some(dequantised), Stored::Int8(_) | Stored::FourBit(_)) = (&dequantised, stored) {
                let values = read.values(def.tensor);
                assert_eq!(bits(&values), bits(&dequantised.f32s(&def.name)), "{name} {}", def.name);
            }
        }
    }
}

const BLOCKS: [usize; 4] = [32, 128, 512, 4096];
const KINDS: [(&str, FourBitKind); 2] = [("nf4", FourBitKind::Nf4), ("fp4", FourBitKind::Fp4)];

/// The same numbers in blocks of other sizes, by bitsandbytes.
#[test]
fn blocks_of_other_sizes() {
    let v = Tensors::read(fixture("five/blocks.safetensors"));
    let w: Vec<f32> = (0..66 * 64).map(|i| (i * 7919 % 2003 - 1001) as f32 / 1024.0).collect();
    for (block, (name, kind)) in BLOCKS.into_iter().flat_map(|b| KINDS.map(|k| (b, k))) {
        let options = |double_quant| FourBitOptions {
            kind,
            double_quant,
            source: FloatType::F32,
            compute: Compute::F32,
            block,
        };
        let (plain, nested) = (FourBit::encode(&w, options(false)), FourBit::encode(&w, options(true)));
        let at = |part: &str| format!("{name}.{block}.{part}");
        assert_eq!(plain.packed, v.bytes(&at("plain.packed")), "{}", at("plain"));
        assert_eq!(plain.absmax, Absmax::Plain(v.f32s(&at("plain.absmax"))), "{}", at("plain"));
        assert_eq!(nested.packed, v.bytes(&at("nested.packed")), "{}", at("nested"));
        let values: Vec<u16> = nested.dequantise().iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
        let Absmax::Nested { codes, nested_absmax, offset, .. } = nested.absmax else { panic!("not nested") };
        assert_eq!(codes, v.bytes(&at("nested.absmax")), "{}", at("nested"));
        assert_eq!(bits(&nested_absmax), bits(&v.f32s(&at("nested.nested_absmax"))), "{}", at("nested"));
        assert_eq!(bits(&[offset]), bits(&v.f32s(&at("nested.offset"))), "{}", at("nested"));
        if kind == FourBitKind::Nf4 {
            let want = v.bytes(&at("nested.values"));
            assert!(values.iter().flat_map(|b| b.to_le_bytes()).eq(want), "{}: decoded", at("nested"));
        }
    }
}

/// Whole files in blocks of every size: read back as written, decoded by the formula, and answering as their decoded
/// weights do.
#[test]
fn files_with_blocks_of_other_sizes() {
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let sentence = Encoding { ids: vec![2, 7, 11, 5, 3], types: vec![] };
    let logits = |model: Model| model.logits(std::slice::from_ref(&sentence), 1).unwrap();
    for (block, (name, kind)) in BLOCKS.into_iter().flat_map(|b| KINDS.map(|k| (b, k))) {
        for double_quant in [false, true] {
            let options =
                FourBitOptions { kind, double_quant, source: FloatType::F32, compute: Compute::F32, block };
            let mut checkpoint = source.clone();
            let weights = source.spec.linears().into_iter().map(|(lin, ..)| Tensor::W(lin));
            for t in weights.chain([Tensor::Word]) {
                checkpoint.set(t, Stored::FourBit(FourBit::encode(&source.values(t), options)));
            }
            let case = format!("{name}-{block}-{double_quant}");
            let out = temporary.path().join(&case);
            let model = ModelDir { checkpoint, tokenizer: TokenizerFiles::default() };
            dir::write(&out, &model, false).unwrap();
            let read = dir::read_checkpoint(&out).unwrap();
            let mut decoded = read.clone();
            for ((def, ours), (_, stored)) in model.checkpoint.tensors().zip(read.tensors()) {
                assert_eq!(ours, stored, "{case} {}", def.name);
                let Stored::FourBit(q) = stored else { continue };
                let scale = |b: usize| match &q.absmax {
                    Absmax::Plain(scales) => scales[b],
                    Absmax::Nested { codes, map, nested_absmax, offset, .. } => {
                        map[usize::from(codes[b])] * nested_absmax[b / 256] + offset
                    }
                };
                let code = |i: usize| usize::from(q.packed[i / 2] >> (4 - 4 * (i % 2)) & 15);
                let values: Vec<f32> = (0..q.len).map(|i| kind.map()[code(i)] * scale(i / block)).collect();
                assert_eq!(bits(&read.values(def.tensor)), bits(&values), "{case} {}", def.name);
                decoded.set(def.tensor, Stored::f32(values));
            }
            let got = logits(Model::load(Source::open(&out).unwrap()).unwrap());
            let want = logits(Model::pack(&decoded));
            // f32 products in another order.
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-4), "{case}: {got:?} {want:?}");
        }
    }
}

/// At threshold 0 LLM.int8() has no outlier columns: every column is among the integers, however large.
#[test]
fn threshold_0_has_no_outliers() {
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let with = |threshold| {
        quantise(&source, &[("*".to_owned(), Scheme::BnbInt8 { threshold })], &default_keep(&source.spec)).unwrap()
    };
    let sentence = Encoding { ids: vec![2, 7, 11, 5, 3], types: vec![] };
    let logits = |ck: &Checkpoint| Model::pack(ck).logits(std::slice::from_ref(&sentence), 1).unwrap();
    let (off, never) = (logits(&with(0.0)), logits(&with(1e30)));
    assert_eq!(off, never, "nothing is that large");
    assert_ne!(off, logits(&with(0.5)), "this one has outliers");
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("off");
    dir::write(&out, &ModelDir { checkpoint: with(0.0), tokenizer: TokenizerFiles::default() }, false).unwrap();
    let config = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains("\"llm_int8_threshold\": 0.0"), "{config}");
    assert_eq!(logits(&dir::read_checkpoint(&out).unwrap()), off);
}

#[test]
fn int8_without_our_key_is_llm_int8_and_with_it_what_it_says() {
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let input = |path: &Path| match dir::read_checkpoint(path).unwrap().get(Tensor::W(Lin::Up(1))) {
        Stored::Int8(q) => q.input,
        other => panic!("{other:?}"),
    };
    assert_eq!(input(&fixture("bnb/int8")), Int8Input::Mixed { threshold: 6.0 });
    for (name, scheme, expected) in [
        ("a", Scheme::Int8, Int8Input::Dynamic),
        ("b", Scheme::BnbInt8 { threshold: 4.5 }, Int8Input::Mixed { threshold: 4.5 }),
    ] {
        let checkpoint = quantise(&source, &[("*".to_owned(), scheme)], &[]).unwrap();
        let out = temporary.path().join(name);
        dir::write(&out, &ModelDir { checkpoint, tokenizer: TokenizerFiles::default() }, false).unwrap();
        assert_eq!(input(&out), expected);
        let config = std::fs::read_to_string(out.join("config.json")).unwrap();
        assert!(config.contains("\"llm_int8_skip_modules\": []"), "everything is converted: {config}");
    }
}

/// Float and 4-bit weights that are multiplied in int8 are what scheme `int8` makes of them.
#[test]
fn int8_at_load_is_scheme_int8() {
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let keep = default_keep(&source.spec);
    let stored =
        |ck: &Checkpoint, scheme: &str| quantise(ck, &[("*".into(), scheme.parse().unwrap())], &keep).unwrap();
    let sentence = Encoding { ids: vec![2, 7, 11, 5, 3], types: vec![] };
    let logits = |model: Model| model.logits(std::slice::from_ref(&sentence), 1).unwrap();
    for scheme in ["f32", "bf16", "nf4", "fp4", "int8-weight", "int8", "bnb-int8"] {
        let child = stored(&source, scheme);
        let want = match scheme {
            "bnb-int8" => child.clone(), // its integers stay its own
            "int8-weight" => stored(&source, "int8"),
            _ => stored(&child.to_f32(), "int8"),
        };
        assert_eq!(logits(Model::pack_for(&child, Arithmetic::Int8)), logits(Model::pack(&want)), "{scheme}");
    }
    let mut large = source.clone();
    let up = Tensor::W(Lin::Up(0));
    let mut w = large.values(up).into_owned();
    w[7] = 70000.0;
    large.set(up, Stored::f32(w));
    assert!(logits(Model::pack_for(&large, Arithmetic::Int8)).iter().all(|x| x.is_finite()));
}

#[test]
fn patterns_choose_and_keep_protects() {
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let spec = &source.spec;
    let rules = |r: &[(&str, &str)]| -> Vec<(String, Scheme)> {
        r.iter().map(|(p, s)| (p.to_string(), s.parse().unwrap())).collect()
    };
    let scheme = |rules_: &[(&str, &str)], t: Tensor| {
        let q = quantise(&source, &rules(rules_), &default_keep(spec)).unwrap();
        Scheme::of(q.get(t)).name()
    };
    let (down, up, last) = (Tensor::W(Lin::Down(0)), Tensor::W(Lin::Up(0)), Tensor::W(Lin::Classifier));
    type Rules<'a> = &'a [(&'a str, &'a str)];
    let table: [(Rules, Tensor, &str); 12] = [
        (&[("*", "int8")], down, "int8"),
        (&[("*", "int8"), ("layer.0.ffn_down", "bf16")], down, "bf16"),
        (&[("*", "int8"), ("layer.0.ffn_down", "bf16")], up, "int8"),
        (&[("layer.0.ffn_down", "bf16"), ("*", "int8")], down, "int8"),
        (&[("backbone.encoder.layer.0.output.dense", "nf4")], down, "nf4"),
        (&[("encoder.layer.*.output.dense", "fp4")], down, "fp4"),
        (&[("layer.0.*", "int8-dynamic")], up, "int8"),
        (&[("head.4", "f32"), ("*", "int8")], last, "f32"),
        (&[("*", "f16"), ("*", "int8")], last, "f16"),
        (&[("*", "f16")], Tensor::Word, "f16"),
        (&[("*", "int8")], Tensor::Word, "f32"),
        (&[("*", "nf4")], Tensor::W(Lin::UnusedPooler), "nf4"),
    ];
    for (rules, tensor, expected) in table {
        assert_eq!(scheme(rules, tensor), expected, "{rules:?} {tensor:?}");
    }
    let q = quantise(&source, &rules(&[("*", "int8")]), &[]).unwrap();
    assert_eq!(Scheme::of(q.get(last)), Scheme::Int8, "nothing kept");
    let fail = |ck, r: &[(&str, &str)], keep: &[String]| quantise(ck, &rules(r), keep).unwrap_err().to_string();
    assert!(fail(&source, &[("layer.9.ffn_down", "int8")], &[]).contains("matches nothing"));
    assert!(fail(&source, &[("*", "int8")], &["nothing".into()]).contains("matches nothing"));
    assert!(fail(&q, &[("*", "nf4")], &[]).contains("already"));
    let mut large = source.clone();
    let mut w = large.values(up).into_owned();
    w[7] = 70000.0;
    large.set(up, Stored::f32(w));
    assert!(fail(&large, &[("*", "int8")], &[]).contains("element 7"));
    assert!("int4".parse::<Scheme>().unwrap_err().to_string().contains("expected one of f32"));
    assert!(fail(&source, &[("*", "int8-static")], &[]).contains("needs calibration"));
}

#[test]
fn embedding_rows_are_quantised_by_patterns_about_them_alone() {
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let rules = |r: &[(&str, &str)]| -> Vec<(String, Scheme)> {
        r.iter().map(|(p, s)| (p.to_string(), s.parse().unwrap())).collect()
    };
    let scheme = |r: &[(&str, &str)], keep: &[String], t| {
        Scheme::of(quantise(&source, &rules(r), keep).unwrap().get(t)).name()
    };
    type Rules<'a> = &'a [(&'a str, &'a str)];
    let table: [(Rules, &[String], Tensor, &str); 6] = [
        (&[("*", "int8")], &[], Tensor::Word, "f32"),
        (&[("*", "nf4"), ("embeddings.*", "int8")], &[], Tensor::Word, "int8-weight"),
        (&[("*", "nf4"), ("embeddings.*", "int8")], &[], Tensor::Gamma(quetsch::spec::Norm::Embeddings), "f32"),
        (&[("*", "f16"), ("embeddings.word*", "nf4")], &[], Tensor::Word, "nf4"),
        (&[("*", "f16"), ("embeddings.word*", "nf4")], &[], Tensor::Position, "f16"),
        (&[("*", "bf16"), ("embeddings.*", "int8")], &["*word*".into()], Tensor::Word, "bf16"),
    ];
    for (r, keep, tensor, expected) in table {
        assert_eq!(scheme(r, keep, tensor), expected, "{r:?} {keep:?} {tensor:?}");
    }
    let refused = quantise(&source, &rules(&[("embeddings.*", "bnb-int8")]), &[]).unwrap_err().to_string();
    assert!(refused.contains("looked up"), "{refused}");
}

/// Every row of an int8 table is within half a step of what it was, and the file says which table is in which scheme;
/// nothing of it is for bitsandbytes.
#[test]
fn quantised_embeddings_survive_the_file() {
    let source = dir::read_checkpoint(fixture("tiny_student")).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    for name in ["int8", "nf4"] {
        let rules = [("embeddings.*".to_owned(), name.parse().unwrap())];
        let checkpoint = quantise(&source, &rules, &default_keep(&source.spec)).unwrap();
        let out = temporary.path().join(name);
        let model = ModelDir { checkpoint, tokenizer: TokenizerFiles::default() };
        dir::write(&out, &model, false).unwrap();
        let read = dir::read_checkpoint(&out).unwrap();
        for ((def, ours), (_, stored)) in model.checkpoint.tensors().zip(read.tensors()) {
            assert!(ours == stored, "{name} {}", def.name);
        }
        let config = std::fs::read_to_string(out.join("config.json")).unwrap();
        assert!(config.contains("backbone.embeddings.word_embeddings\": \""), "{config}");
        assert!(!config.contains("quantization_config"), "{config}");
        let width = source.spec.embedding();
        for t in [Tensor::Word, Tensor::Position, Tensor::TokenType] {
            let (was, is) = (source.values(t), read.values(t));
            let largest = was.iter().fold(0.0f32, |m, w| m.max(w.abs()));
            for (was, is) in was.chunks(width).zip(is.chunks(width)) {
                let absmax = was.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                // int8: half a step and the rounding to f16; NF4: half the widest gap (0.3) and the scales' own rounding.
                let bound = if name == "int8" { absmax * (0.5 / 127.0 + 1e-3) } else { 0.2 * largest };
                assert!(was.iter().zip(is).all(|(a, b)| (a - b).abs() <= bound), "{name} {t:?}");
            }
        }
    }
}
