//! Style as a test: the direction of imports, sizes, names, SAFETY comments, dependencies, and that what the
//! documents cite exists. Each rule is a function from a file to what is wrong with it; `each_rule_bites` feeds
//! every one of them something that it must complain about.

#[path = "tidy/documents.rs"]
mod documents;
#[path = "tidy/source.rs"]
mod source;

use source::{Source, line_of};

/// Who may import what; a layer may import itself. `docs/design.md` says why.
const LAYERS: [(&str, &[&str]); 14] = [
    ("capi", &["queue", "image", "storage", "format", "error", "wait"]),
    ("queue", &["image", "storage", "format", "error", "wait"]),
    ("image", &["alloc", "bitmap", "check", "codec", "tables", "plan", "storage", "format", "error", "few", "wait"]),
    ("alloc", &["tables", "storage", "format", "error", "few", "wait"]),
    ("bitmap", &["tables", "storage", "format", "error", "wait"]),
    ("check", &["tables", "storage", "format", "error"]),
    ("codec", &["storage", "format", "error"]),
    ("tables", &["plan", "storage", "format", "error", "wait"]),
    ("plan", &["format"]),
    ("storage", &["wait"]),
    ("format", &["error"]),
    ("error", &[]),
    ("few", &[]),
    ("wait", &[]),
];

const FILE_LINES_MAX: usize = 800;
const FILE_LINES_MEDIAN_MAX: usize = 300;
const FUNCTION_LINES_MAX: usize = 100;
const FUNCTION_LINES_USUAL: usize = 70;
/// How the attribute of a test begins that does not run. In two pieces, so that whoever looks for such tests finds none.
const IGNORED: &str = concat!("#[", "ignore");
const BANNED_MODULES: [&str; 4] = ["util", "utils", "common", "helpers"];

type Findings = Vec<String>;
type Rule = fn(&Source) -> Findings;

fn at(source: &Source, line: usize, what: &str) -> String {
    format!("{}:{line}: {what}", source.path)
}

/// Everything between the ends of names: `crate::wait::Gate` is crate, wait, Gate.
fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

fn layer_of(path: &str) -> Option<&str> {
    let name = path.strip_prefix("src/")?.split(['/', '.']).next()?;
    (name != "lib").then_some(name)
}

fn imports_run_one_way(source: &Source) -> Findings {
    let Some(layer) = layer_of(&source.path) else { return Vec::new() };
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
        return vec![format!("{}: no layer {layer:?} in tests/tidy.rs and docs/design.md", source.path)];
    };
    let mut findings = Vec::new();
    for (offset, root) in source.shipped.match_indices("crate::") {
        let rest = &source.shipped[offset + root.len()..];
        let named = words(rest).next().filter(|_| rest.starts_with(|c: char| c.is_alphabetic()));
        let complaint = match named {
            Some(name) if name == layer || allowed.contains(&name) => continue,
            Some(name) if LAYERS.iter().any(|(layer, _)| *layer == name) => format!("{layer} must not use {name}"),
            _ => "name the layer: crate::layer::Item".into(),
        };
        findings.push(at(source, line_of(&source.shipped, offset), &complaint));
    }
    // From the top file of a layer, `super` is the root of the crate.
    let is_top = source.path.matches('/').count() == 1 || source.path == format!("src/{layer}/mod.rs");
    for (offset, _) in source.shipped.match_indices("super::").filter(|_| is_top) {
        findings.push(at(source, line_of(&source.shipped, offset), "write crate::, not super:: out of a layer"));
    }
    for (offset, _) in source.shipped.match_indices("super::super::") {
        findings.push(at(source, line_of(&source.shipped, offset), "write crate::, not super::super::"));
    }
    findings
}

fn no_glob_imports_of_super(source: &Source) -> Findings {
    let lines = source.shipped.match_indices("super::*").map(|(offset, _)| line_of(&source.shipped, offset));
    lines.map(|line| at(source, line, "use super::* outside of tests")).collect()
}

fn files_are_short(source: &Source) -> Findings {
    let lines = source.text.lines().count();
    let is_source = [".rs", ".c", ".cc", ".py", ".hpp"].iter().any(|end| source.path.ends_with(end));
    if is_source && lines > FILE_LINES_MAX {
        return vec![format!("{}: {lines} lines, more than {FILE_LINES_MAX}", source.path)];
    }
    Vec::new()
}

fn functions_are_short(source: &Source) -> Findings {
    let long = source.functions().into_iter().filter(|function| function.lines > FUNCTION_LINES_MAX);
    long.map(|f| at(source, f.line, &format!("fn {} has {} lines", f.name, f.lines))).collect()
}

/// Each block has a comment of its own: above it, or above the statement that it is in, at most three lines of code
/// away, and with no other unsafe code in between.
fn unsafe_is_explained(source: &Source) -> Findings {
    let code: Vec<&str> = source.code.lines().collect();
    let text: Vec<&str> = source.text.lines().collect();
    let is_unsafe = |line: &str| line.contains("unsafe {") || line.contains("unsafe impl");
    let explained = |line: usize| {
        let mut distance = 0;
        for above in (0..line).rev() {
            if text[above].contains("SAFETY:") {
                return true;
            }
            if !code[above].trim().is_empty() {
                distance += 1;
            }
            if distance > 3 || is_unsafe(code[above]) {
                return false;
            }
        }
        false
    };
    let lines = (0..code.len()).filter(|&line| is_unsafe(code[line]) && !text[line].contains("SAFETY:"));
    lines.filter(|&line| !explained(line)).map(|line| at(source, line + 1, "unsafe without SAFETY:")).collect()
}

fn only_capi_speaks_c(source: &Source) -> Findings {
    if !source.path.starts_with("src/") || source.path.starts_with("src/capi/") {
        return Vec::new();
    }
    let of = |what: &str| source.code.match_indices(what).map(|(offset, _)| offset).collect::<Vec<_>>();
    let offsets = [of("extern \""), of("no_mangle"), of("export_name")].concat();
    offsets.iter().map(|&offset| at(source, line_of(&source.code, offset), "belongs into src/capi")).collect()
}

fn nothing_is_left_undone(source: &Source) -> Findings {
    let mut findings = Vec::new();
    for (number, line) in source.text.lines().enumerate() {
        if words(line).any(|word| ["TODO", "FIXME", "XXX"].contains(&word)) {
            findings.push(at(source, number + 1, "not done yet?"));
        }
    }
    for (number, code) in source.code.lines().enumerate() {
        if ["todo!", "unimplemented!", "dbg!", IGNORED].iter().any(|what| code.contains(what)) {
            findings.push(at(source, number + 1, "left over"));
        }
    }
    findings
}

fn modules_have_telling_names(source: &Source) -> Findings {
    let by_path = source.path.split(['/', '.']).any(|part| BANNED_MODULES.contains(&part));
    let mut after_mod = source.code.match_indices("mod ").map(|(offset, _)| words(&source.code[offset..]).nth(1));
    let by_name = after_mod.any(|name| name.is_some_and(|name| BANNED_MODULES.contains(&name)));
    if by_path || by_name { vec![format!("{}: name a module by what is in it", source.path)] } else { Vec::new() }
}

fn no_paths_of_one_machine(source: &Source) -> Findings {
    let folders = ["work", "tmp", "root", "home"].map(|name| format!("/{name}/"));
    let mut findings = Vec::new();
    for (number, line) in source.text.lines().enumerate() {
        let starts_there = |folder: &String| {
            let before = line.find(folder.as_str()).map(|offset| line[..offset].chars().next_back());
            before.is_some_and(|c| !c.is_some_and(|c| c.is_alphanumeric() || "}_.-)".contains(c)))
        };
        if folders.iter().any(starts_there) {
            findings.push(at(source, number + 1, "absolute path"));
        }
    }
    findings
}

const RULES: [Rule; 9] = [
    imports_run_one_way,
    no_glob_imports_of_super,
    files_are_short,
    functions_are_short,
    unsafe_is_explained,
    only_capi_speaks_c,
    nothing_is_left_undone,
    modules_have_telling_names,
    no_paths_of_one_machine,
];

/// This test's own files spell out what they forbid.
fn is_judged(source: &Source) -> bool {
    !source.path.starts_with("tests/tidy") && !source.path.starts_with("LICENSE")
}

#[test]
fn every_file_is_tidy() {
    let sources = source::all();
    assert!(sources.iter().filter(|source| source.path.starts_with("src/")).count() > 40, "the files are not found");
    let judged = sources.iter().filter(|source| is_judged(source));
    let findings: Findings = judged.flat_map(|source| RULES.iter().flat_map(move |rule| rule(source))).collect();
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

#[test]
fn files_and_functions_are_short_as_a_rule() {
    let sources = source::all();
    let rust = sources.iter().filter(|source| source.is_rust());
    let mut lines: Vec<usize> = rust.clone().map(|source| source.text.lines().count()).collect();
    lines.sort();
    let median = lines[lines.len() / 2];
    assert!(median <= FILE_LINES_MEDIAN_MAX, "the median file has {median} lines");

    let functions: Vec<_> = rust.flat_map(|source| source.functions()).collect();
    let long: Vec<_> = functions.iter().filter(|function| function.lines > FUNCTION_LINES_USUAL).collect();
    let named: Vec<_> = long.iter().map(|function| format!("{} ({} lines)", function.name, function.lines)).collect();
    assert!(long.len() * 100 <= functions.len(), "more than 1 % of {}: {}", functions.len(), named.join(", "));
}

#[test]
fn each_rule_bites() {
    let long = |inside: &str, count| format!("fn a() {{\n{}}}\n", inside.repeat(count));
    let function = long("    b();\n", FUNCTION_LINES_MAX);
    let file = "// one line\n".repeat(FILE_LINES_MAX + 1);
    let bad: [(Rule, &str, &str); 22] = [
        (imports_run_one_way, "src/plan/write.rs", "use crate::storage::Io;"),
        (imports_run_one_way, "src/storage/mod.rs", "use crate::error::Result;"),
        (imports_run_one_way, "src/capi/map.rs", "let a = crate::tables::l2::of();"),
        (imports_run_one_way, "src/wait.rs", "use super::error::Error;"),
        (imports_run_one_way, "src/tables/l1.rs", "use super::super::alloc::Epoch;"),
        (imports_run_one_way, "src/alloc/mod.rs", "use crate::{Error, Result};"),
        (imports_run_one_way, "src/newlayer/mod.rs", ""),
        (no_glob_imports_of_super, "src/plan/read.rs", "use super::*;"),
        (files_are_short, "src/image/mod.rs", &file),
        (functions_are_short, "src/image/mod.rs", &function),
        (unsafe_is_explained, "src/storage/file.rs", "fn a() {\n    unsafe { b() }\n}"),
        (unsafe_is_explained, "src/a.rs", "// SAFETY: one\nunsafe impl Send for A {}\nunsafe impl Sync for A {}"),
        (unsafe_is_explained, "src/a.rs", "// SAFETY: far\na();\nb();\nc();\nd();\nunsafe { e() }"),
        (only_capi_speaks_c, "src/image/mod.rs", "pub extern \"C\" fn a() {}"),
        (nothing_is_left_undone, "src/image/mod.rs", "// TODO: later"),
        (nothing_is_left_undone, "README.md", "FIXME"),
        (nothing_is_left_undone, "src/image/mod.rs", "fn a() { todo!() }"),
        (nothing_is_left_undone, "tests/a.rs", concat!("#[", "ignore = \"slow\"]")),
        (modules_have_telling_names, "src/util.rs", ""),
        (modules_have_telling_names, "src/image/helpers/a.rs", ""),
        (modules_have_telling_names, "src/image/mod.rs", "mod common;"),
        (no_paths_of_one_machine, "docs/a.md", "see /home/somebody/notes"),
    ];
    for (number, (rule, path, text)) in bad.iter().enumerate() {
        assert!(!rule(&Source::new(path, text)).is_empty(), "sample {number} passes: {path}: {text}");
    }
    let good: [(&str, &str); 5] = [
        ("src/plan/write.rs", "use crate::format::Geometry;\n#[cfg(test)]\nmod tests {\n    use super::*;\n}"),
        ("src/tables/l2.rs", "use super::order;\nuse crate::tables::file;\n// crate::alloc is above"),
        ("src/image/own.rs", "// SAFETY: fine,\n// for reasons\nlet a =\n    unsafe { b() };"),
        ("src/capi/io.rs", "pub extern \"C\" fn a() {}"),
        ("tests/check", "folder=$(mktemp -d \"${TMPDIR:-/tmp}/x.XXXXXX\")"),
    ];
    for (path, text) in good {
        let findings: Findings = RULES.iter().flat_map(|rule| rule(&Source::new(path, text))).collect();
        assert!(findings.is_empty(), "{findings:?}");
    }
}
