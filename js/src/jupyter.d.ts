// The few names of JupyterLab that the extension uses. JupyterLab itself provides them at run time.

declare module "@lumino/widgets" {
  export class Widget {
    constructor();
    readonly node: HTMLElement;
    readonly disposed: { connect(slot: () => void): void };
    dispose(): void;
  }
  export class Panel extends Widget {
    readonly widgets: readonly Widget[];
  }
}

declare module "@jupyterlab/apputils" {
  export interface ICommandPalette {
    addItem(options: { command: string; category: string }): void;
  }
  export const ICommandPalette: { readonly name: string };
}

declare module "*.css" {
  const text: string;
  export default text;
}
