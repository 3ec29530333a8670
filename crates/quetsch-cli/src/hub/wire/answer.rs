//! Reading the hub's answers: headers, redirects, sizes and names of contents, none of which is trusted.

use anyhow::{Context, Result, bail, ensure};
use ring::digest::{self, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use ureq::Body;
use ureq::http::{Response, StatusCode, Uri};

/// What the hub says about a file.
pub struct Facts {
    /// Name of its content: SHA-256 of large files, git's SHA-1 of the others.
    pub etag: String,
    /// In bytes.
    pub size: u64,
}

/// A header that is text.
pub fn header_of<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// What a server says, fit for a terminal.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// First byte and whole size, of `bytes 0-0/1234`.
pub fn content_range(response: &Response<Body>) -> Option<(u64, u64)> {
    let (range, size) = header_of(response, "content-range")?.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, size.parse().ok()?))
}

/// The size of a file: of what a redirect points to, of what a part is of, or of the answer itself.
pub fn size_of(response: &Response<Body>) -> Option<u64> {
    let number = |name| header_of(response, name)?.parse().ok();
    match response.status() {
        status if status.is_redirection() => number("x-linked-size"),
        StatusCode::PARTIAL_CONTENT => content_range(response).map(|(_, size)| size),
        _ => number("x-linked-size").or_else(|| number("content-length")),
    }
}

/// What an answer says about a file of this commit.
///
/// # Errors
/// It does not, or about another one.
pub fn facts_of(response: &Response<Body>, commit: &str) -> Result<Facts> {
    let size = size_of(response).context("no size (Content-Length, X-Linked-Size) in the answer")?;
    Ok(Facts { size, ..facts_without_size(response, commit)? })
}

/// The same, with a size of 0.
pub fn facts_without_size(response: &Response<Body>, commit: &str) -> Result<Facts> {
    if let Some(other) = header_of(response, "x-repo-commit").filter(|other| *other != commit) {
        bail!("the answer is of the commit {:?}, asked for was {commit}", printable(other));
    }
    let etag = header_of(response, "x-linked-etag").or_else(|| header_of(response, "etag"));
    let etag = etag.context("no ETag in the answer, by which the cache names a file; is HF_ENDPOINT a hub?")?;
    let etag = etag.trim().trim_start_matches("W/").trim_matches('"');
    let plain = (1..=128).contains(&etag.len()) && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    ensure!(plain, "the ETag {:?} is none of the hub's", printable(etag));
    Ok(Facts { etag: etag.to_string(), size: 0 })
}

/// The hash of a whole file if it is not what its name says: SHA-256 (64 digits) or the SHA-1 of a git blob (40). Other
/// names say nothing about the content, and the size has to do.
pub fn check(file: &mut File, facts: &Facts) -> std::io::Result<Option<String>> {
    if !facts.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let mut context = match facts.etag.len() {
        64 => digest::Context::new(&SHA256),
        40 => {
            let mut context = digest::Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            context.update(format!("blob {}\0", facts.size).as_bytes());
            context
        }
        _ => return Ok(None),
    };
    file.seek(SeekFrom::Start(0))?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => context.update(&buffer[..n]),
        }
    }
    let found: String = context.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect();
    Ok((!found.eq_ignore_ascii_case(&facts.etag)).then_some(found))
}

/// Whether two URLs are of one server.
pub fn same_host(a: &str, b: &str) -> bool {
    let place =
        |url: &str| url.parse::<Uri>().ok().map(|u| (u.scheme_str().map(str::to_string), u.authority().cloned()));
    place(a).is_some_and(|a| Some(a) == place(b))
}

/// Where a redirect leads.
pub fn absolute(from: &str, to: &str) -> Option<String> {
    if to.starts_with("https://") || to.starts_with("http://") {
        return Some(to.to_string());
    }
    let from: Uri = from.parse().ok()?;
    let path = to.strip_prefix('/').filter(|rest| !rest.starts_with('/'))?;
    Some(format!("{}://{}/{path}", from.scheme_str()?, from.authority()?))
}

/// A file's name in a URL.
pub fn escape(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~' | b'/');
    name.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn redirects_are_resolved() {
        let rows = [
            ("/b/c", Some("http://h:1/b/c")),
            ("https://other/x", Some("https://other/x")),
            ("//other/x", None),
            ("c", None),
            ("file:///etc/passwd", None),
        ];
        for (to, want) in rows {
            assert_eq!(absolute("http://h:1/a", to).as_deref(), want, "{to}");
        }
        assert!(same_host("http://h:1/a", "http://h:1/b?c"));
        assert!(!same_host("http://h:1/a", "https://h:1/a") && !same_host("http://h:1/a", "http://h:2/a"));
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(escape("data/a b#ä.csv"), "data/a%20b%23%C3%A4.csv");
    }

    #[test]
    fn contents_are_hashed_as_git_and_lfs_do() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"hello\n").expect("written");
        let mut found = |etag: &str| check(&mut file, &Facts { etag: etag.into(), size: 6 }).expect("read");
        // `printf 'hello\n' | git hash-object --stdin`, `printf 'hello\n' | sha256sum`
        assert_eq!(found("ce013625030ba8dba906f756967f9e9ca394464a"), None);
        assert_eq!(found("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"), None);
        assert_eq!(found("0123").as_deref(), None, "a name that says nothing");
        let other = "0".repeat(64);
        assert_eq!(
            found(&other).as_deref(),
            Some("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03")
        );
    }
}
