//go:build linux

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"time"
)

// Etcd is a store that runs in the underlay, where every node reaches it.
type Etcd struct {
	// URL is where it listens.
	URL string

	lab     *Lab
	process *Process
}

// etcdTimeout is how long it may take to listen.
const etcdTimeout = 20 * time.Second

// StartEtcd starts a program etcd and waits until it answers. It keeps its data
// in the lab's directory.
func (l *Lab) StartEtcd(ctx context.Context, program string) (*Etcd, error) {
	const peerURL = "http://127.0.0.1:2380"
	e := &Etcd{URL: "http://" + Gateway.String() + ":2379", lab: l}
	var err error
	e.process, err = l.Underlay.Start(program,
		"--data-dir", filepath.Join(l.Directory(), "etcd"), "--log-level", "warn",
		"--listen-client-urls", e.URL, "--advertise-client-urls", e.URL,
		"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL, "--initial-cluster", "default="+peerURL,
		// Nothing has to outlive the lab, and nobody else is to be heard of.
		"--unsafe-no-fsync", "--heartbeat-interval", "1000", "--election-timeout", "5000")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, etcdTimeout, errors.New("no answer"))
	defer cancel()
	for {
		_, err := e.ask(ctx, "kv/range", map[string][]byte{"key": []byte("any")})
		if err == nil {
			return e, nil
		}
		if !e.process.Running() || sleep(ctx, 20*time.Millisecond) != nil {
			return nil, fmt.Errorf("starting etcd: %w\n%s", err, e.process.Output())
		}
	}
}

// Put writes keys and values.
func (e *Etcd) Put(ctx context.Context, pairs map[string]string) error {
	type put struct {
		Key   []byte `json:"key"`
		Value []byte `json:"value"`
	}
	type operation struct {
		Put put `json:"requestPut"`
	}
	var operations []operation
	for key, value := range pairs {
		operations = append(operations, operation{put{[]byte(key), []byte(value)}})
	}
	const most = 100 // operations in a transaction: etcd takes 128
	for some := range slices.Chunk(operations, most) {
		if _, err := e.ask(ctx, "kv/txn", map[string]any{"success": some}); err != nil {
			return fmt.Errorf("writing to etcd: %w", err)
		}
	}
	return nil
}

// ask calls etcd's API in its JSON form, in which bytes are base64.
func (e *Etcd) ask(ctx context.Context, method string, question any) ([]byte, error) {
	text, err := json.Marshal(question)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, e.URL+"/v3/"+method, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	response, err := e.lab.Underlay.HTTP().Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", method, response.Status, body)
	}
	return body, err
}
