package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/klog/v2"
)

// Bounds of a question to the API server. A watch has its own: the server ends
// it after some minutes, and a connection on which nothing comes is probed and
// given up by HTTP/2.
const (
	askTimeout  = 30 * time.Second
	listTimeout = 2 * time.Minute
	// retries is how often client-go asks again by itself what failed on the
	// way, before it says that it failed. By default that is ten times, which
	// takes minutes when a server takes connections and says nothing.
	retries = 1
)

// client speaks to the API server of the few things that are needed here. The
// clientset of client-go would know all kinds of objects, at some megabytes.
type client struct {
	rest *rest.RESTClient
	// host is the API server's URL.
	host string
	// logger takes what client-go logs.
	logger klog.Logger
}

// newClient makes a client. Nothing is asked yet.
func newClient(o Options) (*client, error) {
	config, err := clientConfig(o)
	if err != nil {
		return nil, err
	}
	config.UserAgent = "weft/" + o.Version
	config.APIPath = "/api"
	config.GroupVersion = &corev1.SchemeGroupVersion
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("preparing the Kubernetes API's types: %w", err)
	}
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	// A Node in protobuf takes a third of the time to read that it takes in JSON.
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	// A node asks next to nothing: one watch, and a patch now and then. This
	// keeps a fault from becoming a flood.
	config.QPS, config.Burst = 5, 10
	config.WarningHandlerWithContext = warnings{o.Log}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return failures{next} })
	r, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("preparing the client of the Kubernetes API %s: %w", config.Host, err)
	}
	return &client{rest: r, host: config.Host, logger: quietLogger(o.Log)}, nil
}

// clientConfig finds the API server and this process's credentials for it.
func clientConfig(o Options) (*rest.Config, error) {
	if o.Kubeconfig == "" && o.APIURL == "" {
		config, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, errors.New("this is not a pod that knows its Kubernetes API (KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set); give --kubeconfig-file or --kube-api-url")
		}
		if err != nil {
			return nil, fmt.Errorf("reading the pod's service account: %w", err)
		}
		return config, nil
	}
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: o.Kubeconfig},
		&clientcmd.ConfigOverrides{ClusterInfo: clientcmdapi.Cluster{Server: o.APIURL}}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig file %s: %w", o.Kubeconfig, err)
	}
	return config, nil
}

// warnings logs what the API server says beside its answers.
type warnings struct{ log *slog.Logger }

// HandleWarningHeaderWithContext implements rest.WarningHandlerWithContext.
func (w warnings) HandleWarningHeaderWithContext(_ context.Context, code int, _, text string) {
	w.log.Debug("the Kubernetes API warns", "code", code, "text", text)
}

// within bounds the time of a question.
func (c *client) within(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(klog.NewContext(ctx, c.logger), timeout)
}

// node asks for one Node.
func (c *client) node(ctx context.Context, name string) (*corev1.Node, error) {
	ctx, cancel := c.within(ctx, askTimeout)
	defer cancel()
	node := &corev1.Node{}
	return node, c.rest.Get().MaxRetries(retries).Resource("nodes").Name(name).Do(ctx).Into(node)
}

// pod asks for one Pod.
func (c *client) pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	ctx, cancel := c.within(ctx, askTimeout)
	defer cancel()
	pod := &corev1.Pod{}
	return pod, c.rest.Get().MaxRetries(retries).Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(pod)
}

// patch changes a Node through its status, which is all that flannel's role
// allows; labels and annotations can be changed there too.
func (c *client) patch(ctx context.Context, name string, patch []byte) (*corev1.Node, error) {
	ctx, cancel := c.within(ctx, askTimeout)
	defer cancel()
	node := &corev1.Node{}
	return node, c.rest.Patch(types.StrategicMergePatchType).MaxRetries(retries).Resource("nodes").Name(name).SubResource("status").
		Body(patch).Do(ctx).Into(node)
}

// list asks for all Nodes.
func (c *client) list(ctx context.Context, options metav1.ListOptions) (*corev1.NodeList, error) {
	ctx, cancel := c.within(ctx, listTimeout)
	defer cancel()
	nodes := &corev1.NodeList{}
	return nodes, c.rest.Get().MaxRetries(retries).Resource("nodes").VersionedParams(&options, metav1.ParameterCodec).Do(ctx).Into(nodes)
}

// watch asks for changes of Nodes.
func (c *client) watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	options.Watch = true
	var failure error
	ctx = context.WithValue(klog.NewContext(ctx, c.logger), failureKey{}, &failure)
	w, err := c.rest.Get().MaxRetries(retries).Resource("nodes").VersionedParams(&options, metav1.ParameterCodec).Watch(ctx)
	if err == nil && failure != nil {
		w.Stop()
		return nil, failure
	}
	return w, err
}

// failures notes why there was no answer to a watch. Where it timed out or was
// cut off, client-go says that all went well and gives a watch that has ended.
type failures struct{ next http.RoundTripper }

// failureKey is where a request's context has room for that.
type failureKey struct{}

// RoundTrip implements http.RoundTripper.
func (f failures) RoundTrip(q *http.Request) (*http.Response, error) {
	a, err := f.next.RoundTrip(q)
	if failure, ok := q.Context().Value(failureKey{}).(*error); ok {
		*failure = err
	}
	return a, err
}

// FindNode returns the name of this process's node: what NODE_NAME says, else
// the node of the pod that POD_NAME and POD_NAMESPACE name, which is asked of
// the API. getenv is os.Getenv. An API that does not answer gives an *Away.
func FindNode(ctx context.Context, o Options, getenv func(string) string) (string, error) {
	if name := getenv("NODE_NAME"); name != "" {
		return name, nil
	}
	name, namespace := getenv("POD_NAME"), getenv("POD_NAMESPACE")
	if name == "" || namespace == "" {
		return "", errors.New("this node's name is not known; set NODE_NAME, or POD_NAME and POD_NAMESPACE, as a pod can from its fieldRefs spec.nodeName, metadata.name and metadata.namespace")
	}
	c, err := newClient(o)
	if err != nil {
		return "", err
	}
	began := time.Now()
	pod, err := c.pod(ctx, namespace, name)
	if err != nil {
		return "", fmt.Errorf("finding this node's name by its pod %s/%s: %w", namespace, name, &Away{Host: c.host, Since: began, Err: err})
	}
	if pod.Spec.NodeName == "" {
		return "", fmt.Errorf("pod %s/%s (POD_NAMESPACE, POD_NAME) is on no node; is it this process's?", namespace, name)
	}
	return pod.Spec.NodeName, nil
}
