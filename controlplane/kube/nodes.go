package kube

import (
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
)

// nodes holds what the API server has said of all Nodes. A reflector, which
// lists and watches, writes it; every change of something that is read is a
// nudge.
type nodes struct {
	reader reader
	// nudge is called, from the reflector, after a change.
	nudge func()

	mu     sync.Mutex
	own    own
	others map[string]neighbor
	// generation counts the changes of others that matter. It is zero before
	// all Nodes were seen.
	generation uint64
}

var _ cache.TransformingStore = (*nodes)(nil)

// newNodes makes an empty one.
func newNodes(r reader, nudge func()) *nodes {
	return &nodes{reader: r, nudge: nudge, others: map[string]neighbor{}}
}

// Own returns the own Node, and the generation of the others, which is zero
// before all Nodes were seen once.
func (n *nodes) Own() (me own, generation uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.own, n.generation
}

// Others returns the other nodes that say something, in no order, and their
// generation.
func (n *nodes) Others() (others []neighbor, generation uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	others = make([]neighbor, 0, len(n.others))
	for _, o := range n.others {
		if o.says() {
			others = append(others, o)
		}
	}
	return others, n.generation
}

// Transformer implements cache.TransformingStore: it is used while the first
// look at all Nodes is taken, which are kept aside until it is complete.
func (n *nodes) Transformer() cache.TransformFunc { return n.reader.trim }

// Add implements cache.ReflectorStore.
func (n *nodes) Add(object any) error { return n.Update(object) }

// Update implements cache.ReflectorStore. What tells us nothing new costs no
// more than reading it.
func (n *nodes) Update(object any) error {
	node, ok := object.(*corev1.Node)
	if !ok {
		return fmt.Errorf("the Kubernetes API sent a %T among the Nodes", object)
	}
	if node.Name == n.reader.node {
		n.setOwn(n.reader.own(node))
		return nil
	}
	n.set(n.reader.neighbor(node))
	return nil
}

// Delete implements cache.ReflectorStore.
func (n *nodes) Delete(object any) error {
	node, ok := object.(*corev1.Node)
	if !ok {
		return fmt.Errorf("the Kubernetes API sent a %T among the Nodes", object)
	}
	if node.Name == n.reader.node {
		n.setOwn(own{})
		return nil
	}
	n.mu.Lock()
	matters := n.others[node.Name].says()
	delete(n.others, node.Name)
	n.turn(matters)
	n.mu.Unlock()
	if matters {
		n.nudge()
	}
	return nil
}

// Replace implements cache.ReflectorStore: these are all Nodes there are.
func (n *nodes) Replace(objects []any, _ string) error {
	var me own
	others := make(map[string]neighbor, len(objects))
	for _, object := range objects {
		node, ok := object.(*corev1.Node)
		switch {
		case !ok:
			return fmt.Errorf("the Kubernetes API sent a %T among the Nodes", object)
		case node.Name == n.reader.node:
			me = n.reader.own(node)
		default:
			others[node.Name] = n.reader.neighbor(node)
		}
	}
	n.mu.Lock()
	for name, o := range others {
		others[name] = o.after(n.others[name])
	}
	n.own, n.others = me, others
	n.generation++
	n.mu.Unlock()
	n.nudge()
	return nil
}

// Resync implements cache.ReflectorStore. Nothing asks for it.
func (n *nodes) Resync() error { return nil }

// setOwn notes the own Node. Every sight of it counts, as its version does.
func (n *nodes) setOwn(o own) {
	n.mu.Lock()
	n.own = o
	n.mu.Unlock()
	n.nudge()
}

// set notes another node.
func (n *nodes) set(o neighbor) {
	n.mu.Lock()
	old := n.others[o.name]
	o = o.after(old)
	matters := !old.equal(o) && (old.says() || o.says())
	n.others[o.name] = o
	n.turn(matters)
	n.mu.Unlock()
	if matters {
		n.nudge()
	}
}

// turn begins a new generation. While all Nodes are being seen for the first
// time there is none yet.
func (n *nodes) turn(matters bool) {
	if matters && n.generation > 0 {
		n.generation++
	}
}
