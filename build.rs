//! Writes `include/qcow2.h` from `src/capi/` under the feature `header`; does nothing otherwise.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "header")]
    header::write();
}

#[cfg(feature = "header")]
mod header {
    use std::fmt::Write as _;
    use std::path::Path;
    use std::{env, fs};

    /// The sections of the manual, in its order: simple calls first, then facts, then advanced.
    const SECTIONS: &[&str] = &[
        "version", "error", "image", "io", "create", "resize", "opts", "facts", "map", "snapshot", "bitmap", "check",
        "queue", "storage",
    ];

    /// Writes the header, into the folder `$QCOW2_HEADER_DIR` or, without one, into the source tree.
    pub fn write() {
        println!("cargo::rerun-if-changed=src/capi");
        println!("cargo::rerun-if-changed=cbindgen.toml");
        println!("cargo::rerun-if-env-changed=QCOW2_HEADER_DIR");
        let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
        let root = Path::new(&root);
        let folder = env::var("QCOW2_HEADER_DIR").unwrap_or_else(|_| "include".to_owned());
        let mut text = fs::read_to_string(root.join("src/capi/header-start.h")).expect("the head of the header");
        for section in SECTIONS {
            text.push_str(&write_section(root, section));
        }
        text.push_str("#ifdef __cplusplus\n}\n#endif\n\n#endif /* QCOW2_H */\n");
        let folder = root.join(folder);
        fs::create_dir_all(&folder).expect("the folder of the header");
        let file = folder.join("qcow2.h");
        // Left alone when it is the same, so that nothing is rebuilt for it.
        if fs::read_to_string(&file).ok().as_deref() != Some(&text) {
            fs::write(&file, text).expect("the header");
        }
    }

    /// One file of the ABI: its opening comment becomes the section's introduction.
    fn write_section(root: &Path, name: &str) -> String {
        let source = root.join("src/capi").join(name).with_extension("rs");
        let text = fs::read_to_string(&source).expect("a source of the ABI");
        let mut opening = text.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim);
        let title = opening.next().expect("an opening comment");
        let rule = "=".repeat(96 - title.len());
        let mut out = format!("/* {title} {rule}\n");
        for line in opening {
            let _ = writeln!(out, "{}", format!(" * {line}").trim_end());
        }
        out.push_str(" */\n\n");
        let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
        let bindings = cbindgen::Builder::new().with_config(config).with_src(source).generate().expect("bindings");
        let mut section = Vec::new();
        bindings.write(&mut section);
        out.push_str(&compact(String::from_utf8(section).expect("UTF-8").trim()));
        out.push_str("\n\n");
        out
    }

    /// Comments of one line on one line, and runs of constants without gaps.
    fn compact(text: &str) -> String {
        let lines: Vec<&str> = text.lines().collect();
        let mut out: Vec<String> = Vec::new();
        let mut at = 0;
        while at < lines.len() {
            match &lines[at..] {
                [open, line, close, ..] if open.trim() == "/**" && close.trim() == "*/" => {
                    let indent = &open[..open.len() - 3];
                    let gap =
                        out.len() > 1 && out[out.len() - 1].is_empty() && out[out.len() - 2].starts_with("#define");
                    if gap && lines.get(at + 3).is_some_and(|next| next.starts_with("#define")) {
                        out.pop();
                    }
                    out.push(format!("{indent}/** {} */", line.trim().trim_start_matches("* ")));
                    at += 3;
                }
                _ => {
                    out.push(lines[at].to_owned());
                    at += 1;
                }
            }
        }
        out.join("\n")
    }
}
