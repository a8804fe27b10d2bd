//! What the documents say about the code is there.

use std::collections::BTreeSet;
use std::path::Path;

use super::source::{self, Source};
use super::words;

/// Everything in backticks, outside of code blocks.
fn quoted(text: &str) -> Vec<&str> {
    let outside: Vec<&str> = text.split("```").step_by(2).collect();
    outside.iter().flat_map(|part| part.lines()).flat_map(|line| line.split('`').skip(1).step_by(2)).collect()
}

fn defines(source: &Source, name: &str) -> bool {
    let kinds = ["fn", "struct", "enum", "trait", "type", "const", "mod", "union"];
    let mut before = "";
    words(&source.code).any(|word| {
        let found = word == name && kinds.contains(&before);
        before = word;
        found
    })
}

/// Whether `source` is the module `name`, or a part of it.
fn is_in_module(source: &Source, name: &str) -> bool {
    source.path.trim_end_matches(".rs").split('/').any(|part| part == name)
}

/// `module::name`, `module::module` or `Type::name`.
fn resolves(sources: &[Source], path: &str) -> bool {
    let parts: Vec<&str> = path.split("::").map(|part| words(part).next().unwrap_or("")).collect();
    let (name, parent) = (parts[parts.len() - 1], parts[parts.len() - 2]);
    let rust = || sources.iter().filter(|source| source.path.starts_with("src/") && source.is_rust());
    let is_type = parent.starts_with(char::is_uppercase);
    let home = |source: &&Source| if is_type { defines(source, parent) } else { is_in_module(source, parent) };
    let found_there = |source: &Source| defines(source, name) || is_in_module(source, name);
    rust().filter(home).any(found_there)
}

fn project_file(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn what_the_documents_name_exists() {
    let sources = source::all();
    let is_document = |source: &&Source| source.path.ends_with(".md");
    let mut checked = 0;
    let mut missing = Vec::new();
    for document in sources.iter().filter(is_document) {
        for name in quoted(&document.text) {
            let is_file = ["src/", "tests/", "docs/", "include/", "examples/", "capi-tests/", "python/", "benches/"]
                .iter()
                .any(|folder| name.starts_with(folder))
                && !name.contains(['*', ' ', '<'])
                && !name.ends_with(".rst"); // QEMU's
            let is_item = document.path == "docs/design.md" && name.contains("::") && !name.contains(' ');
            let exists = match (is_file, is_item) {
                (true, _) => sources.iter().any(|source| source.path.starts_with(name.trim_end_matches('/'))),
                (_, true) => resolves(&sources, name),
                _ => continue,
            };
            checked += 1;
            if !exists {
                missing.push(format!("{}: `{name}`", document.path));
            }
        }
    }
    assert!(checked > 15, "only {checked} names are found");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// D1, M3, O7: the invariants that comments cite.
fn is_invariant(word: &str) -> bool {
    let digits = word.strip_prefix(['D', 'M', 'O']);
    digits.is_some_and(|digits| !digits.is_empty() && digits.len() < 3 && digits.bytes().all(|b| b.is_ascii_digit()))
}

#[test]
fn the_invariants_that_comments_cite_are_in_the_design() {
    let design = project_file("docs/design.md");
    let mut cited = 0;
    for source in source::all().iter().filter(|source| source.path.starts_with("src/") && source.is_rust()) {
        for (_, comment) in source.text.lines().filter_map(|line| line.split_once("//")) {
            let words: Vec<&str> = words(comment).collect();
            // "scenario D11" is another D11.
            let is_cited = |at: &usize| is_invariant(words[*at]) && !(*at > 0 && words[at - 1].starts_with("scenario"));
            for id in (0..words.len()).filter(is_cited).map(|at| words[at]) {
                cited += 1;
                assert!(design.contains(&format!("| {id} |")), "{}: {id} is not in docs/design.md", source.path);
            }
        }
    }
    assert!(cited > 10, "only {cited} are found");
}

#[test]
fn names_that_do_not_exist_are_noticed() {
    let sources = [Source::new("src/tables/l2.rs", "pub struct Slice;\nimpl Slice {\n    fn load() {}\n}\n")];
    for good in ["l2::load", "tables::l2", "Slice::load", "tables::l2::Slice"] {
        assert!(resolves(&sources, good), "{good}");
    }
    for bad in ["l1::load", "l2::store", "Slice::store", "Table::load", "tables::l1"] {
        assert!(!resolves(&sources, bad), "{bad}");
    }
}

/// The names and the dependencies of each package in a Cargo.lock.
fn locked(lock: &str) -> Vec<(&str, Vec<&str>)> {
    let mut packages = Vec::new();
    for package in lock.split("[[package]]").skip(1) {
        let name = package.lines().find(|line| line.starts_with("name = ")).unwrap();
        let dependencies = package.split_once("dependencies = [").map_or("", |(_, list)| list);
        let names = dependencies.lines().filter(|line| line.trim().starts_with('"'));
        packages.push((
            name.trim_start_matches("name = ").trim_matches('"'),
            names.map(|line| line.trim().trim_matches(['"', ',']).split(' ').next().unwrap()).collect(),
        ));
    }
    packages
}

/// All that the packages `from` need, themselves included.
fn tree<'a>(lock: &'a str, from: &[&'a str]) -> BTreeSet<&'a str> {
    let packages = locked(lock);
    let mut found = BTreeSet::new();
    let mut open: Vec<&str> = from.to_vec();
    while let Some(name) = open.pop() {
        if found.insert(name) {
            let needed = packages.iter().filter(|(package, _)| *package == name).flat_map(|(_, needs)| needs);
            open.extend(needed);
        }
    }
    found
}

#[test]
fn the_dependencies_are_those_that_the_design_explains() {
    let (manifest, lock, design) =
        (project_file("Cargo.toml"), project_file("Cargo.lock"), project_file("docs/design.md"));
    let section = |name: &str| manifest.split(name).nth(1).map_or("", |rest| rest.split("\n[").next().unwrap());
    let direct: Vec<&str> = section("\n[dependencies]\n").lines().filter_map(|line| line.split(" = ").next()).collect();
    let direct: Vec<&str> = direct.into_iter().filter(|name| !name.is_empty() && !name.starts_with('#')).collect();
    assert!(direct.contains(&"libc"), "{direct:?}");

    let explained = design.split("## Dependencies").nth(1).expect("design.md has a section on dependencies");
    let sentence = explained.split("All that a build pulls in: ").nth(1).expect("the sentence that lists the tree");
    let listed: BTreeSet<&str> = quoted(sentence.split(".\n").next().unwrap()).into_iter().collect();
    assert_eq!(listed, tree(&lock, &direct), "left: docs/design.md, right: Cargo.lock");
    for name in direct {
        assert!(explained.contains(&format!("| `{name}`")), "docs/design.md does not say why {name} is needed");
    }
}

#[test]
fn a_tree_of_dependencies_is_read_from_a_lock_file() {
    let lock = "[[package]]\nname = \"a\"\ndependencies = [\n \"b\",\n \"c 1.0.0\",\n]\n\n[[package]]\nname = \"b\"\n\n\
                [[package]]\nname = \"c\"\ndependencies = [\n \"a\",\n]\n\n[[package]]\nname = \"d\"\n";
    assert_eq!(tree(lock, &["a"]).into_iter().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(tree(lock, &["b"]).into_iter().collect::<Vec<_>>(), ["b"]);
}
