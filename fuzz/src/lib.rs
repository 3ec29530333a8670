//! What the fuzz targets share: a bound on every allocation, a folder to put files in, small models, seeds.
//!
//! A target's input is at most some 100 KB, so whoever asks for more than [`MOST`] bytes at once believed a number in
//! it. libFuzzer's own limit sees only memory that was written to.

use quetsch::batch::{Batch, Encoding};
use quetsch::checkpoint::Checkpoint;
use quetsch::dir::{self, ModelDir, Source};
use quetsch::quant::{Scheme, quantise_calibrated};
use quetsch::runtime::{Model, Workspace};
use quetsch::spec::{Activation, Family, HeadSpec, LayerShape, ModelSpec};
use quetsch::tokenizer::TokenizerFiles;
use quetsch_kernels::watch::Watched;
use quetsch_serve::{Config, Listening, ModelSource, serve};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use tokio::sync::Notify;

/// Bytes that nothing read here may need at once.
const MOST: usize = 64 << 20;

#[global_allocator]
static ALLOCATOR: Watched = Watched::new(usize::MAX, MOST);

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// An empty folder of this process, in memory where there is such a place.
pub fn folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = base.join(format!("quetsch-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for files");
    folder
}

/// A line between the parts of an input.
pub const BETWEEN: &str = "\n%%\n";

/// The parts of an input between lines of `%%`.
pub fn parts(mut data: &[u8]) -> Vec<&[u8]> {
    let mut parts = vec![];
    while let Some(at) = data.windows(BETWEEN.len()).position(|w| w == BETWEEN.as_bytes()) {
        parts.push(&data[..at]);
        data = &data[at + BETWEEN.len()..];
    }
    parts.push(data);
    parts
}

/// Panics of a library are not findings if the reader makes errors of them: whoever lets one through ends the process
/// all the same.
pub fn allow_panics_of(library: &'static str) {
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|at| at.file().contains(library)) {
            abort(panic);
        }
    }));
}

/// Writes what `make` gives to the folder that `SEEDS` names and ends, if there is one: `fuzz/run` asks for it.
pub fn seeds(make: impl FnOnce() -> Vec<Vec<u8>>) {
    let Some(place) = std::env::var_os("SEEDS").map(PathBuf::from) else { return };
    fs::create_dir_all(&place).expect("a folder for seeds");
    for (i, seed) in make().into_iter().enumerate() {
        fs::write(place.join(format!("seed-{i:03}")), seed).expect("a seed");
    }
    std::process::exit(0);
}

/// A server on loopback, HTTP and gRPC, with the models `tiny` and `bert`; soon ready.
pub fn server() -> Listening {
    let fixtures = root().join("fixtures");
    let source = |name: &str, dir: &str| ModelSource { name: name.into(), path: fixtures.join(dir) };
    let mut config = Config::new(vec![source("tiny", "tiny_student"), source("bert", "tiny_bert")]);
    (config.port, config.grpc_port, config.threads) = (0, Some(0), 1);
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let listening = move |at| tell.send(at).expect("somebody waits");
        let forever = std::future::pending();
        runtime
            .expect("a runtime")
            .block_on(serve(config, listening, forever, Arc::new(Notify::new())))
            .expect("no end");
    });
    told.recv().expect("addresses")
}

/// A model of some 400 parameters: uneven layers, one of them without heads.
pub fn small(head: HeadSpec, prefix: &str) -> Checkpoint {
    let layers = vec![LayerShape { heads: vec![0, 2], ffn: 6 }, LayerShape { heads: vec![], ffn: 3 }];
    let spec = ModelSpec {
        family: Family::Bert,
        prefix: prefix.into(),
        vocab: 11,
        positions: 7,
        token_types: 2,
        hidden: 8,
        head_dim: 2,
        original_heads: 4,
        layers,
        ffn_activation: Activation::Gelu,
        norm_eps: 1e-12,
        head,
        unused_pooler: prefix == "backbone.",
    };
    let labels = (0..head.labels()).map(|i| format!("label {i}")).collect();
    Checkpoint::random(spec, labels, 7).expect("a random model")
}

/// The student and the stock classifier, small.
pub fn models() -> Vec<Checkpoint> {
    vec![small(HeadSpec::MeanMlp { labels: 3 }, "backbone."), small(HeadSpec::Pooler { labels: 2 }, "bert.")]
}

/// config.json and model.safetensors of a checkpoint.
pub fn files(ck: &Checkpoint) -> (Vec<u8>, Vec<u8>) {
    let out = folder().join("made");
    dir::write(&out, &ModelDir { checkpoint: ck.clone(), tokenizer: TokenizerFiles::default() }, true)
        .expect("a model directory");
    let read = |name: &str| fs::read(out.join(name)).expect("a file that was written");
    (read("config.json"), read(dir::WEIGHTS))
}

/// Reads a directory in both ways, whole and tensor by tensor; where it is a model, both must give the same answer.
pub fn read_model(path: &Path) {
    let whole = dir::read_checkpoint(path);
    let parts = Source::open(path).and_then(Model::load);
    let (whole, parts) = match (whole, parts) {
        (Ok(whole), Ok(parts)) => (whole, parts),
        (Err(_), Err(_)) => return,
        (whole, parts) => panic!("whole {:?}, in parts {:?}", whole.err(), parts.err()),
    };
    let ids = [0, 1, 2].map(|i: u32| i.min(whole.spec.vocab.saturating_sub(1) as u32)).to_vec();
    let Ok(batch) = Batch::new(&whole.spec, &[Encoding { ids, types: vec![] }]) else { return };
    let mut ws = Workspace::default();
    let a = Model::pack(&whole).forward(&mut ws, &batch).expect("weights in memory");
    let b = parts.forward(&mut ws, &batch).expect("a file that stays");
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    assert!(a.len() == b.len() && a.iter().zip(&b).all(same), "{a:?} and {b:?}");
}

/// Small models in every scheme.
pub fn schemes() -> impl Iterator<Item = Checkpoint> {
    const RULES: [&[(&str, &str)]; 9] = [
        &[],
        &[("*", "f16")],
        &[("*", "bf16")],
        &[("*", "int8")],
        &[("*", "int8-weight")],
        &[("*", "bnb-int8"), ("embeddings.*", "int8")],
        &[("*", "nf4"), ("embeddings.*", "nf4")],
        &[("*", "fp4")],
        &[("*", "bf16"), ("layer.0.*", "int8"), ("layer.0.ffn_*", "nf4"), ("layer.1.ffn_up", "int8-static")],
    ];
    let quantised = |(ck, rules): (Checkpoint, &[(&str, &str)])| {
        let rules: Vec<(String, Scheme)> =
            rules.iter().map(|(p, s)| (p.to_string(), s.parse().expect("a scheme"))).collect();
        let ranges = ck.spec.linears().into_iter().map(|(lin, ..)| (lin, 2.5)).collect();
        quantise_calibrated(&ck, &rules, &[], &ranges).expect("a quantised model")
    };
    models().into_iter().flat_map(move |ck| RULES.map(|rules| quantised((ck.clone(), rules))))
}
