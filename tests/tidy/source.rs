//! Source files as the rules see them: the text, and the same text with everything blanked that is not code.

use std::path::{Path, PathBuf};
use std::process::Command;

/// One text file of the project.
pub struct Source {
    /// Path from the root of the project, with `/` between the parts.
    pub path: String,
    /// The file as it is.
    pub text: String,
    /// The same lines and columns for Rust files, with comments and the contents of strings as spaces.
    pub code: String,
    /// As `code`, with `#[cfg(test)]` items as spaces too.
    pub shipped: String,
}

/// One function: where it begins, and how many lines it has.
pub struct Function {
    pub name: String,
    pub line: usize,
    pub lines: usize,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        let code = if path.ends_with(".rs") { only_code(text) } else { String::new() };
        let is_test = path.starts_with("tests/") || path.ends_with("/tests.rs");
        let shipped = if is_test { String::new() } else { without_tests(&code) };
        Self { path: path.into(), text: text.into(), code, shipped }
    }

    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// The functions that have a body, nested ones included.
    pub fn functions(&self) -> Vec<Function> {
        let mut found = Vec::new();
        for (start, _) in self.code.match_indices("fn ") {
            let before = self.code[..start].chars().next_back();
            let name: String =
                self.code[start + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if name.is_empty() || before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
                continue;
            }
            if let Some(end) = end_of_item(&self.code, start).filter(|&end| self.code[..end].ends_with('}')) {
                let lines = self.code[start..end].lines().count();
                found.push(Function { name, line: line_of(&self.code, start), lines });
            }
        }
        found
    }
}

/// Every text file that is tracked or about to be, or, outside of a Git checkout, every one there is.
pub fn all() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let git = Command::new("git").args(["ls-files", "-co", "--exclude-standard"]).current_dir(root).output();
    let mut paths: Vec<PathBuf> = match git {
        Ok(out) if out.status.success() && !out.stdout.is_empty() => {
            String::from_utf8(out.stdout).unwrap().lines().map(|line| root.join(line)).collect()
        }
        _ => walk(root),
    };
    paths.sort();
    let relative = |path: &Path| path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
    let read = |path: &PathBuf| std::fs::read_to_string(path).ok().map(|text| Source::new(&relative(path), &text));
    paths.iter().filter_map(read).collect()
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_file() {
            found.push(path);
        } else if !name.starts_with('.') && !["target", "build", "__pycache__"].contains(&name) {
            found.extend(walk(&path));
        }
    }
    found
}

pub fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// Where the item that begins at `start` ends: after its block, or after its semicolon if it has none.
fn end_of_item(code: &str, start: usize) -> Option<usize> {
    let (mut braces, mut brackets) = (0, 0);
    for (at, c) in code[start..].char_indices() {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets -= 1,
            '{' => braces += 1,
            '}' => braces -= 1,
            _ => {}
        }
        if (c == '}' && braces == 0) || (c == ';' && braces == 0 && brackets == 0) {
            return Some(start + at + 1);
        }
        if braces < 0 || brackets < 0 {
            return None;
        }
    }
    None
}

fn blank(text: &str) -> String {
    text.chars().map(|c| if c == '\n' { c } else { ' ' }).collect()
}

fn without_tests(code: &str) -> String {
    let mut rest = code.to_string();
    let marker = "#[cfg(test)]";
    while let Some(start) = rest.find(marker) {
        let after = start + marker.len();
        let end = end_of_item(&rest, after).unwrap_or(rest.len());
        let blanked = blank(&rest[start..end]);
        rest.replace_range(start..end, &blanked);
    }
    rest
}

/// How many bytes of a comment, a string or a character are at the beginning of `text`, if one is there; and how
/// many bytes at either end of it are to be kept (the quotes of a string).
fn not_code(text: &str) -> Option<(usize, usize)> {
    let until = |end: &str, from: usize| text[from..].find(end).map_or(text.len(), |at| from + at + end.len());
    if text.starts_with("//") {
        return Some((text.find('\n').unwrap_or(text.len()), 0));
    }
    if text.starts_with("/*") {
        return Some((until("*/", 2), 0));
    }
    if text.starts_with("r\"") || text.starts_with("r#") {
        let hashes = text[1..].chars().take_while(|&c| c == '#').count();
        let opened = text[1 + hashes..].starts_with('"');
        return opened.then(|| (until(&format!("\"{}", "#".repeat(hashes)), 2 + hashes), 0));
    }
    if let Some(character) = text.strip_prefix('\'') {
        let mut chars = character.chars();
        let first = chars.next()?;
        let from = 1 + first.len_utf8() + if first == '\\' { chars.next()?.len_utf8() } else { 0 };
        // Otherwise a lifetime.
        let is_character = first == '\\' || chars.next() == Some('\'');
        return is_character.then(|| (until("'", from), 1));
    }
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1).take_while(|_| text.starts_with('"')) {
        if c == '"' && !escaped {
            return Some((at + 1, 1));
        }
        escaped = c == '\\' && !escaped;
    }
    None
}

fn only_code(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let in_word = code.chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
        let here = &text[at..];
        match not_code(here).filter(|_| !(in_word && here.starts_with('r'))) {
            Some((length, keep)) => {
                code.push_str(&here[..keep]);
                code.push_str(&blank(&here[keep..length - keep]));
                code.push_str(&here[length - keep..length]);
                at += length;
            }
            None => {
                let c = here.chars().next().unwrap();
                code.push(c);
                at += c.len_utf8();
            }
        }
    }
    code
}

#[test]
fn comments_strings_and_characters_are_blanked() {
    for (text, code) in [
        ("a // b\nc", "a     \nc"),
        ("a /* { */ b", "a         b"),
        ("x = \"{ \\\" }\";", "x = \"      \";"),
        ("r#\"{\"# y", "       y"),
        ("'{' '\\'' &'a T", "' ' '  ' &'a T"),
        ("b'x' <'a, 'b>", "b' ' <'a, 'b>"),
        ("for x in r { }", "for x in r { }"),
    ] {
        assert_eq!(only_code(text), code, "{text}");
    }
    let source =
        Source::new("src/x.rs", "fn a() {\n    b();\n}\n#[cfg(test)]\nmod tests {\n    fn c() {}\n}\nfn d();\n");
    assert!(!source.shipped.contains("fn c") && source.shipped.contains("fn d"));
    let found: Vec<_> = source.functions().into_iter().map(|f| (f.name, f.line, f.lines)).collect();
    assert_eq!(found, [("a".to_string(), 1, 3), ("c".to_string(), 6, 1)]);
}
