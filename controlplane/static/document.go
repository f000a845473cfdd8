package static

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// document is a file as it is written: texts and the lines they stand on. What
// the texts mean is checked afterwards, so that one look finds every fault.
type document struct {
	// line is 0 when the file has no keys at all to check.
	line      int
	uplink    scalar
	publicIP  scalar
	vni       scalar
	port      scalar
	mtu       scalar
	networks  list
	node      entry
	nodeGiven bool
	peers     []entry
}

// entry is this node or one of its peers. A node has no publicIP of its own: it
// stands at the top of the file.
type entry struct {
	line     int
	usable   bool
	name     scalar
	prefixes list
	publicIP scalar
	mac      scalar
}

// scalar is one value.
type scalar struct {
	line int
	text string
	// given tells that the key is there; usable, that it held one plain value.
	given, usable bool
}

// list is a list of values.
type list struct {
	line   int
	given  bool
	usable bool
	values []scalar
}

// readDocument reads the shape of a file: its keys, and a value of the right
// kind for each. Faults in shape are noted in f.
func readDocument(data []byte, f *faults) document {
	root, ok := parseYAML(data, f)
	if !ok {
		return document{}
	}
	var d document
	r := reader{f}
	var peersGiven bool
	usable := r.mapping(root, "the file", []field{
		{"interface", func(n *yaml.Node) { d.uplink = r.scalar(n, "interface") }},
		{"publicIP", func(n *yaml.Node) { d.publicIP = r.scalar(n, "publicIP") }},
		{"vni", func(n *yaml.Node) { d.vni = r.scalar(n, "vni") }},
		{"port", func(n *yaml.Node) { d.port = r.scalar(n, "port") }},
		{"mtu", func(n *yaml.Node) { d.mtu = r.scalar(n, "mtu") }},
		{"network", func(n *yaml.Node) { d.networks = r.list(n, "network") }},
		{"node", func(n *yaml.Node) { d.node, d.nodeGiven = r.node(n), true }},
		{"peers", func(n *yaml.Node) { d.peers, peersGiven = r.peers(n), true }},
	})
	if !usable {
		return d
	}
	d.line = root.Line
	// A file that was cut off while it was written must not read as a node
	// without peers.
	if !peersGiven {
		f.add(d.line, `peers is missing; list the other nodes, or write "peers: []" if there are none`)
	}
	return d
}

// yamlLine finds the line in an error of the YAML parser.
var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?(.*)$`)

// parseYAML returns the root of the one document in data.
func parseYAML(data []byte, f *faults) (*yaml.Node, bool) {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var root yaml.Node
	err := decoder.Decode(&root)
	if errors.Is(err, io.EOF) {
		f.add(1, "the file is empty; see the example in weft's documentation")
		return nil, false
	}
	if err != nil {
		addYAMLFault(err, f)
		return nil, false
	}
	var second yaml.Node
	switch err := decoder.Decode(&second); {
	case err == nil:
		f.add(max(second.Line, 1), "a second YAML document begins here; put everything into one, without ---")
		return nil, false
	case !errors.Is(err, io.EOF):
		addYAMLFault(err, f)
		return nil, false
	}
	if root.Kind != yaml.DocumentNode || len(root.Content) != 1 {
		f.add(1, "the file has no content; see the example in weft's documentation")
		return nil, false
	}
	return root.Content[0], true
}

// addYAMLFault notes what the YAML parser could not read.
func addYAMLFault(err error, f *faults) {
	line := 1
	text := strings.ReplaceAll(err.Error(), "\n", " ")
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil && n > 0 {
			line = n
		}
		text = m[2]
	}
	f.add(line, "this is not YAML: %s", text)
}

// reader turns YAML nodes into texts and notes what has the wrong shape.
type reader struct {
	faults *faults
}

// field is a key and what reads its value.
type field struct {
	key  string
	read func(*yaml.Node)
}

// mapping reads the keys of n, each at most once and none that is not a field.
func (r reader) mapping(n *yaml.Node, what string, fields []field) (usable bool) {
	if n.Kind != yaml.MappingNode {
		r.faults.add(n.Line, "%s is %s; it must be keys with values", what, describe(n))
		return false
	}
	r.plain(n, what)
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		read, ok := lookup(fields, key)
		switch {
		case !ok:
			r.faults.add(key.Line, "%s: unknown key %s; known are %s", what, describe(key), names(fields))
		case seen[key.Value] > 0:
			r.faults.add(key.Line, "%s: key %q was given on line %d already; keep one", what, key.Value, seen[key.Value])
		default:
			seen[key.Value] = key.Line
			read(value)
		}
	}
	return true
}

// lookup finds the field a key names.
func lookup(fields []field, key *yaml.Node) (func(*yaml.Node), bool) {
	if key.Kind != yaml.ScalarNode {
		return nil, false
	}
	for _, f := range fields {
		if f.key == key.Value {
			return f.read, true
		}
	}
	return nil, false
}

// names lists the keys of fields.
func names(fields []field) string {
	var keys []string
	for _, f := range fields {
		keys = append(keys, f.key)
	}
	return strings.Join(keys, ", ")
}

// scalar reads one plain value.
func (r reader) scalar(n *yaml.Node, what string) scalar {
	s := scalar{line: n.Line, given: true}
	switch {
	case n.Kind != yaml.ScalarNode:
		r.faults.add(n.Line, "%s is %s; give one value", what, describe(n))
	case n.ShortTag() == "!!null" || n.Value == "":
		r.faults.add(n.Line, "%s has no value; give one, or leave the key out", what)
	default:
		r.plain(n, what)
		s.text, s.usable = n.Value, true
	}
	return s
}

// list reads a list of plain values.
func (r reader) list(n *yaml.Node, what string) list {
	l := list{line: n.Line, given: true}
	if n.Kind != yaml.SequenceNode {
		r.faults.add(n.Line, "%s is %s; give a list, as in [10.244.0.0/16]", what, describe(n))
		return l
	}
	r.plain(n, what)
	l.usable = true
	for i, item := range n.Content {
		s := r.scalar(item, fmt.Sprintf("%s[%d]", what, i))
		l.usable = l.usable && s.usable
		l.values = append(l.values, s)
	}
	return l
}

// node reads what the file says of this node.
func (r reader) node(n *yaml.Node) entry {
	e := entry{line: n.Line}
	e.usable = r.mapping(n, "node", []field{
		{"name", func(n *yaml.Node) { e.name = r.scalar(n, "node.name") }},
		{"prefixes", func(n *yaml.Node) { e.prefixes = r.list(n, "node.prefixes") }},
		{"mac", func(n *yaml.Node) { e.mac = r.scalar(n, "node.mac") }},
	})
	return e
}

// peers reads the list of peers.
func (r reader) peers(n *yaml.Node) []entry {
	if n.Kind != yaml.SequenceNode {
		r.faults.add(n.Line, `peers is %s; list the other nodes, or write "peers: []" if there are none`, describe(n))
		return nil
	}
	if len(n.Content) > MaxPeers {
		r.faults.add(n.Line, "peers has %d entries; the limit is %d", len(n.Content), MaxPeers)
		return nil
	}
	r.plain(n, "peers")
	entries := make([]entry, 0, len(n.Content))
	for i, item := range n.Content {
		entries = append(entries, r.peer(item, fmt.Sprintf("peers[%d]", i)))
	}
	return entries
}

// peer reads one peer.
func (r reader) peer(n *yaml.Node, what string) entry {
	e := entry{line: n.Line}
	e.usable = r.mapping(n, what, []field{
		{"name", func(n *yaml.Node) { e.name = r.scalar(n, what+".name") }},
		{"prefixes", func(n *yaml.Node) { e.prefixes = r.list(n, what+".prefixes") }},
		{"publicIP", func(n *yaml.Node) { e.publicIP = r.scalar(n, what+".publicIP") }},
		{"mac", func(n *yaml.Node) { e.mac = r.scalar(n, what+".mac") }},
	})
	return e
}

// plain refuses an anchor. Aliases are refused as values of the wrong kind; so
// a small file stays small when it is read.
func (r reader) plain(n *yaml.Node, what string) {
	if n.Anchor != "" {
		r.faults.add(n.Line, "%s has the anchor &%s; write values out, without anchors and aliases", what, n.Anchor)
	}
}

// describe says in words what kind of thing n is.
func describe(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "keys with values"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Kind == yaml.AliasNode:
		return "an alias"
	case n.ShortTag() == "!!null":
		return "empty"
	}
	return quote(n.Value)
}

// quote shows a value, shortened when it is long.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}
