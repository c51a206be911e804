{{- define "knn-moe.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "knn-moe.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "knn-moe.labels" -}}
{{ include "knn-moe.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "knn-moe.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "knn-moe.name" .) "default") }}
{{- end }}

{{- define "knn-moe.image" -}}
{{ required "image.repository: the sidecar's image in a registry of yours, e.g. registry.example.org/knnmoe/sidecar" .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What cannot work, before anything is made of it. */}}
{{- define "knn-moe.check" -}}
{{- $embedded := not .Values.qdrant.url }}
{{- if and $embedded (gt (int .Values.replicas) 1) }}
{{- fail (printf "replicas: got %d, expected 1 without qdrant.url: embedded memories are one pod's alone" (int .Values.replicas)) }}
{{- end }}
{{- if and $embedded (eq .Values.kind "DaemonSet") (not .Values.persistence.hostPath) }}
{{- fail "kind DaemonSet: needs qdrant.url, or persistence.hostPath for memories of each node's own" }}
{{- end }}
{{- if and $embedded (eq .Values.kind "Sidecar") (not .Values.persistence.existingClaim) }}
{{- fail "kind Sidecar: needs qdrant.url, or persistence.existingClaim for embedded memories" }}
{{- end }}
{{- if and (eq .Values.kind "Sidecar") (not .Values.model.container) }}
{{- fail "kind Sidecar: needs model.container, the container of the model" }}
{{- end }}
{{- if and (eq .Values.kind "StatefulSet") (not .Values.insecure) (not (and .Values.tls.secretName .Values.tokens.secretName)) }}
{{- fail "kind StatefulSet: needs tls.secretName and tokens.secretName, or insecure: true" }}
{{- end }}
{{- if and (ne .Values.kind "StatefulSet") (ne .Values.socket.mode "600") (not .Values.tokens.secretName) }}
{{- fail (printf "socket.mode: got %s, expected 600 without tokens.secretName" .Values.socket.mode) }}
{{- end }}
{{- end }}

{{/* HTTP inside the pod: whatever the service listens on, and whether its Qdrant server is there, /livez is. */}}
{{- define "knn-moe.probe" -}}
exec:
  command: [python, -c, "import urllib.request as r; r.urlopen('http://127.0.0.1:{{ .root.Values.metrics.port }}{{ .path }}', timeout=4)"]
timeoutSeconds: 5
{{- end }}

{{- define "knn-moe.container" -}}
{{- $tcp := eq .Values.kind "StatefulSet" -}}
name: sidecar
image: {{ include "knn-moe.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
  - serve
  - --data=/var/lib/knnmoe
  - --listen={{ $tcp | ternary "0.0.0.0:50051" "unix:/run/knnmoe/router.sock" }}
  {{- if not $tcp }}
  - --socket-mode={{ .Values.socket.mode }}
  {{- else if .Values.tls.secretName }}
  - --tls-cert=/etc/knnmoe/tls/tls.crt
  - --tls-key=/etc/knnmoe/tls/tls.key
  {{- with .Values.tls.clientCa }}
  - --tls-client-ca=/etc/knnmoe/tls/{{ . }}
  {{- end }}
  {{- end }}
  {{- with .Values.tokens }}
  {{- if .secretName }}
  - --tokens=/etc/knnmoe/tokens/{{ .key }}
  {{- end }}
  {{- end }}
  - --metrics={{ .Values.metrics.scrape | ternary "0.0.0.0" "127.0.0.1" }}:{{ .Values.metrics.port }}
  - --drain-s={{ .Values.drainSeconds }}
  {{- with .Values.qdrant }}
  {{- if .url }}
  - --backend={{ .url }}
  {{- if .apiKeySecret.name }}
  - --qdrant-api-key-file=/etc/knnmoe/qdrant-key/{{ .apiKeySecret.key }}
  {{- end }}
  {{- if .caSecret.name }}
  - --qdrant-ca-file=/etc/knnmoe/qdrant-ca/{{ .caSecret.key }}
  {{- end }}
  {{- if .replicationFactor }}
  - --qdrant-replication-factor={{ .replicationFactor }}
  {{- end }}
  {{- end }}
  {{- end }}
  {{- if or .Values.insecure .Values.metrics.scrape }}
  - --insecure
  {{- end }}
  {{- with .Values.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
env:
  # Of router-admin in this container.
  - {name: ROUTER_ADMIN_TARGET, value: {{ $tcp | ternary "127.0.0.1:50051" "unix:/run/knnmoe/router.sock" | quote }}}
ports:
  {{- if $tcp }}
  - {name: grpc, containerPort: 50051}
  {{- end }}
  - {name: metrics, containerPort: {{ .Values.metrics.port }}}
# Opening large memories takes a while: an hour. A model beside it starts afterwards, and is ready without it from then on:
# generation goes on when the memories are away.
startupProbe:
  {{- include "knn-moe.probe" (dict "root" . "path" "/readyz") | nindent 2 }}
  periodSeconds: 5
  failureThreshold: 720
{{- if ne .Values.kind "Sidecar" }}
readinessProbe:
  {{- include "knn-moe.probe" (dict "root" . "path" "/readyz") | nindent 2 }}
  periodSeconds: 10
  failureThreshold: 2
{{- end }}
livenessProbe:
  {{- include "knn-moe.probe" (dict "root" . "path" "/livez") | nindent 2 }}
  periodSeconds: 20
  failureThreshold: 3
{{- if and $tcp .Values.preStopSeconds }}
lifecycle:
  preStop:
    exec: {command: [sleep, {{ .Values.preStopSeconds | quote }}]}
{{- end }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
volumeMounts:
  - {name: data, mountPath: /var/lib/knnmoe}
  - {name: tmp, mountPath: /tmp}
  {{- if not $tcp }}
  - {name: socket, mountPath: /run/knnmoe}
  {{- end }}
  {{- range $name, $secret := include "knn-moe.secrets" . | fromYaml }}
  {{- if $secret }}
  - {name: {{ $name }}, mountPath: /etc/knnmoe/{{ $name }}, readOnly: true}
  {{- end }}
  {{- end }}
{{- end }}

{{/* The secrets that are given, by the name of their volume: whole directories, which follow a secret that changes. */}}
{{- define "knn-moe.secrets" -}}
{{- $tcp := eq .Values.kind "StatefulSet" -}}
tls: {{ $tcp | ternary .Values.tls.secretName "" | quote }}
tokens: {{ .Values.tokens.secretName | quote }}
qdrant-key: {{ .Values.qdrant.apiKeySecret.name | quote }}
qdrant-ca: {{ .Values.qdrant.caSecret.name | quote }}
{{- end }}

{{/* Of a pod, but for `data` and `socket`. */}}
{{- define "knn-moe.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 64Mi}
{{- range $name, $secret := include "knn-moe.secrets" . | fromYaml }}
{{- if $secret }}
- name: {{ $name }}
  secret: {secretName: {{ $secret }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}

{{/* A pod's metadata and spec, but for containers and volumes. */}}
{{- define "knn-moe.pod" -}}
metadata:
  labels:
    {{- include "knn-moe.labels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "knn-moe.serviceAccount" . }}
  automountServiceAccountToken: false
  # Calls in flight, then the flush and the engine processes.
  terminationGracePeriodSeconds: {{ add .Values.drainSeconds .Values.preStopSeconds 50 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ .Values.user }}
    runAsGroup: {{ .Values.user }}
    fsGroup: {{ .Values.user }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- range $key := list "imagePullSecrets" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" }}
  {{- with index $.Values $key }}
  {{ $key }}: {{ toJson . }}
  {{- end }}
  {{- end }}
{{- end }}
