//! Answers of a hub on loopback: status lines, headers, lists of files, files. Nothing is written outside of the cache.
//!
//! The first byte of an input is what is asked for. The rest are the answers in the order in which they are given, again
//! from the first one after the last, between lines of `%%`: status, headers, an empty line, the body. `$HUB` in a
//! header is the hub's address, `$OTHER` that of the place for large files; without Content-Length it is added, and right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch_fuzz::{BETWEEN, parts};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

const NAMES: [&str; 4] = ["hf:org/tiny", "hf:org/tiny@refs/pr/1", "hf:org/data:train", "hf:org/data@main:a/train"];
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The answers, and how many were given.
static ANSWERS: Mutex<(Vec<Vec<u8>>, usize)> = Mutex::new((vec![], 0));
static ADDRESS: LazyLock<String> = LazyLock::new(|| {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    address
});
static OTHER: LazyLock<String> = LazyLock::new(|| ADDRESS.replace("127.0.0.1", "localhost"));
/// The cache is some levels down, so that a path that leads up ends in [`quetsch_fuzz::folder`].
static TOP: LazyLock<PathBuf> = LazyLock::new(|| quetsch_fuzz::folder().join("a"));

/// Answers the requests of a connection until the client may wait for bytes that do not come.
fn serve(stream: TcpStream) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut request = String::new();
        while !request.ends_with("\r\n\r\n") {
            if stream.read_line(&mut request).ok()? == 0 {
                return None;
            }
        }
        let answer = {
            let (answers, given) = &mut *ANSWERS.lock().expect("no panic");
            *given += 1;
            answers.get((*given - 1) % answers.len())?.clone()
        };
        let at = answer.windows(2).position(|w| w == b"\n\n").unwrap_or(answer.len());
        let body = answer.get(at + 2..).unwrap_or_default();
        let head = String::from_utf8_lossy(&answer[..at]).replace("$HUB", &ADDRESS).replace("$OTHER", &OTHER);
        let mut head: String =
            head.lines().filter(|l| !l.is_empty() && stays(l)).map(|l| format!("{l}\r\n")).collect();
        let own = ["content-length", "transfer-encoding"].iter().all(|h| !head.to_lowercase().contains(h));
        if own {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        let body = if request.starts_with("HEAD") { &[] } else { body };
        stream.get_mut().write_all(&[head.as_bytes(), b"\r\n", body].concat()).ok()?;
        if !own || !["2", "3", "4", "5"].iter().any(|s| head.starts_with(&format!("HTTP/1.1 {s}"))) {
            return None;
        }
    }
}

/// Whether a line of a head leads to no other server: those of others are not asked.
fn stays(line: &str) -> bool {
    let here = || [&*ADDRESS, &*OTHER].iter().any(|a| line.contains(&format!(" http://{a}/")));
    !line.to_lowercase().contains("location") || !line.contains("//") || line.matches("//").count() == 1 && here()
}

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let [name, answers @ ..] = data else { return };
        let name = NAMES[*name as usize % NAMES.len()];
        let cache = cache();
        if let Ok(path) = fetch(name, answers) {
            assert!(path.starts_with(&cache), "{}", path.display());
        }
        let repository = name[3..].split(['@', ':']).next().unwrap_or_default().replace('/', "--");
        for (folder, allowed) in [
            (quetsch_fuzz::folder(), &["a"][..]),
            (TOP.clone(), &["b"]),
            (TOP.join("b"), &["hub"]),
            (cache.clone(), &[".locks", &format!("models--{repository}"), &format!("datasets--{repository}")]),
        ] {
            for entry in fs::read_dir(folder).expect("a folder").flatten() {
                assert!(allowed.iter().any(|a| entry.file_name() == *a), "{}", entry.path().display());
            }
        }
        check_links(&cache, &cache.canonicalize().expect("a folder"));
        fs::remove_dir_all(&*TOP).expect("a folder in memory");
    }
);

fn cache() -> PathBuf {
    TOP.join("b/hub")
}

/// Fetches into an empty cache from a hub that gives these answers.
fn fetch(name: &str, answers: &[u8]) -> Result<PathBuf, impl std::fmt::Debug> {
    *ANSWERS.lock().expect("no panic") = (parts(answers).into_iter().map(<[u8]>::to_vec).collect(), 0);
    fs::create_dir_all(cache()).expect("a folder in memory");
    quetsch_cli::fetch_from(&format!("http://{}", *ADDRESS), &cache(), name)
}

/// No link leads out of the cache.
fn check_links(folder: &Path, cache: &Path) {
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        let kind = entry.file_type().expect("a kind");
        if kind.is_dir() {
            check_links(&path, cache);
        } else if kind.is_symlink() {
            let to = path.canonicalize().expect("a link to something");
            assert!(to.starts_with(cache), "{} -> {}", path.display(), to.display());
        }
    }
}

/// What the hub and its mirrors answer, also when they are busy, point elsewhere or break off.
fn seeds() -> Vec<Vec<u8>> {
    let seed = |name: u8, answers: &[String]| [&[name], answers.join(BETWEEN).as_bytes()].concat();
    let listing = |names: &[&str]| {
        let siblings: Vec<String> = names.iter().map(|n| format!(r#"{{"rfilename":"{n}"}}"#)).collect();
        format!("HTTP/1.1 200 OK\n\n{{\"sha\":\"{COMMIT}\",\"siblings\":[{}]}}", siblings.join(","))
    };
    let file =
        |etag: &str, text: &str| format!("HTTP/1.1 200 OK\nETag: \"{etag}\"\nX-Repo-Commit: {COMMIT}\n\n{text}");
    let small = |etag: &str, text: &str| [file(etag, text), file(etag, text)];
    // `printf 'hello\n' | git hash-object --stdin`, `printf 'hello\n' | sha256sum`
    let git = "ce013625030ba8dba906f756967f9e9ca394464a";
    let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
    let pointer = format!(
        "HTTP/1.1 302 Found\nX-Linked-ETag: \"{sha256}\"\nX-Linked-Size: 6\nX-Repo-Commit: {COMMIT}\n\
         Location: http://$OTHER/lfs/x\n\n"
    );
    let model = listing(&["config.json", "model.safetensors", "README.md", "onnx/model.onnx"]);
    let hello = || small(git, "hello\n");
    let shards = r#"{"weight_map":{"x":"a.safetensors","y":"b/b.safetensors"}}"#;
    let index = listing(&["config.json", "model.safetensors.index.json", "a.safetensors", "b/b.safetensors"]);
    let busy = "HTTP/1.1 429 Too Many Requests\nRetry-After: 1\nX-Error-Message: busy\n\n".to_owned();
    let gone = "HTTP/1.1 404 Not Found\n\n".to_owned();
    let no_head = "HTTP/1.1 405 Method Not Allowed\n\n".to_owned();
    let first = format!("HTTP/1.1 206 Partial Content\nETag: W/\"{git}\"\nContent-Range: bytes 0-0/6\n\nh");
    let begin = format!("HTTP/1.1 200 OK\nETag: \"{git}\"\nContent-Length: 6\n\nhel");
    let rest = "HTTP/1.1 206 Partial Content\nContent-Range: bytes 3-5/6\n\nlo\n".to_owned();
    let moved = "HTTP/1.1 307 Temporary Redirect\nLocation: /org/tiny2\n\n".to_owned();
    let elsewhere = pointer.replace("http://$OTHER", "//other");
    let list = |parts: &[&[String]]| parts.concat();
    let seeds = vec![
        seed(0, &list(&[&[model.clone()], &hello(), &small("abc", "# A card\n"), &small("def-2", "weights")])),
        seed(
            1,
            &list(&[
                &[model.clone()],
                &hello(),
                &small("c", "A card"),
                &[pointer.clone(), pointer.clone(), file("x", "hello\n")],
            ]),
        ),
        seed(0, &list(&[&[index], &small("abc", "{}"), &small("i", shards), &small("a", "1"), &small("b", "2")])),
        seed(0, &list(&[&[busy, model.clone()], &[no_head, first, begin.clone(), rest.clone()], &hello()])),
        seed(0, &[model.clone(), moved.clone(), begin.clone(), moved, begin.clone(), rest, elsewhere]),
        seed(2, &list(&[&[gone, listing(&["train.csv", "data/test.csv"])], &small("t", "text,label\n")])),
        seed(
            2,
            &list(&[
                &[listing(&["default/train/0000.parquet", "default/train/0001.parquet"])],
                &small("p0", "PAR1"),
                &small("p1", "PAR1"),
            ]),
        ),
        seed(3, &list(&[&[listing(&["a/train.csv", "b/train.csv"])], &[pointer], &hello()])),
        seed(0, &[listing(&["config.json", "../../../x", "/etc/x", "model.safetensors"])]),
    ];
    let is_fetched = |seed: &&Vec<u8>| {
        let found = fetch(NAMES[seed[0] as usize], &seed[1..]);
        fs::remove_dir_all(&*TOP).expect("a folder in memory");
        found.is_ok()
    };
    assert_eq!(
        seeds.iter().filter(is_fetched).count(),
        seeds.len() - 2,
        "all but what moves away and what is hostile"
    );
    seeds
}
