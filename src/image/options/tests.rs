use super::{CreateOptions, Error, OPTIONS, OpenOptions, OptionInfo, OptionKind, Result};

/// Values that each option of the table takes, and some that none takes.
fn examples(info: &OptionInfo) -> Vec<&'static str> {
    match info.kind {
        OptionKind::Bool => vec!["on", "off", "true", "false"],
        OptionKind::Size => vec!["64k", "65536", "1M"],
        OptionKind::Number => vec!["0", "17"],
        OptionKind::Text => vec!["base.qcow2"],
        OptionKind::Choice(list) => list.to_vec(),
    }
}

#[test]
fn the_table_describes_what_the_setters_do() {
    for info in OPTIONS {
        let mut values = examples(info);
        values.extend((!info.default.is_empty()).then_some(info.default));
        for value in values {
            let (open, create) =
                (OpenOptions::default().set(info.key, value), CreateOptions::default().set(info.key, value));
            assert_eq!((open.is_ok(), create.is_ok()), (info.open, info.create), "{}={value}", info.key);
        }
        for value in ["", "maybe", "-1", "1.5", "64kk", "99999999999999999999", "18446744073709551615T", "ON"] {
            if info.kind == OptionKind::Text && !value.is_empty() {
                continue;
            }
            let result = if info.open {
                OpenOptions::default().set(info.key, value)
            } else {
                CreateOptions::default().set(info.key, value)
            };
            let Err(Error::OptionValue { key, value: named, .. }) = result else {
                panic!("{}={value}: {result:?}", info.key)
            };
            assert_eq!((key.as_str(), named.as_str()), (info.key, value));
        }
    }
}

#[test]
fn setting_the_default_changes_nothing() {
    let (mut open, mut create) = (OpenOptions::default(), CreateOptions::default());
    for info in OPTIONS.iter().filter(|o| !o.default.is_empty()) {
        if info.open {
            open.set(info.key, info.default).unwrap();
        } else {
            create.set(info.key, info.default).unwrap();
        }
    }
    assert_eq!(format!("{open:?}"), format!("{:?}", OpenOptions::default()));
    assert_eq!(create, CreateOptions::default());
}

#[test]
fn unknown_keys_are_named() {
    let text = |r: Result<()>| r.unwrap_err().to_string();
    assert_eq!(text(OpenOptions::default().set("readonly", "on")), "unknown option 'readonly'");
    assert!(text(OpenOptions::default().set("cluster_size", "64k")).contains("cluster_size (it is for creating"));
    assert!(text(CreateOptions::default().set("backing", "any")).contains("backing (it is for opening"));
}

#[test]
fn what_does_not_go_together_is_named() {
    let cases: [(&[(&str, &str)], &str); 9] = [
        (&[("extended_l2", "on"), ("cluster_size", "8k")], "cluster_size"),
        (&[("extended_l2", "on"), ("compat", "v2")], "extended_l2"),
        (&[("lazy_refcounts", "on"), ("compat", "0.10")], "lazy_refcounts"),
        (&[("refcount_bits", "8"), ("compat", "0.10")], "refcount_bits"),
        (&[("compression_type", "zstd"), ("compat", "0.10")], "compression_type"),
        (&[("backing_file", "b")], "backing_fmt"),
        (&[("backing_fmt", "raw")], "backing_fmt"),
        (&[("backing_file", "b"), ("backing_fmt", "raw"), ("preallocation", "falloc")], "preallocation"),
        (&[], ""),
    ];
    for (settings, culprit) in cases {
        let mut options = CreateOptions::default();
        for (key, value) in settings {
            options.set(key, value).unwrap();
        }
        match options.geometry() {
            Err(Error::OptionValue { key, .. }) => assert_eq!(key, culprit),
            other => assert!(culprit.is_empty() && other.is_ok(), "{settings:?}: {other:?}"),
        }
    }
    let values = CreateOptions { cluster_size_bytes: 1000, ..Default::default() };
    assert!(matches!(values.geometry(), Err(Error::OptionValue { key, .. }) if key == "cluster_size"));
    let values = CreateOptions { refcount_bits: 3, ..Default::default() };
    assert!(matches!(values.geometry(), Err(Error::OptionValue { key, .. }) if key == "refcount_bits"));
}
